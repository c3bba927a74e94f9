"""A prefix of an object store: S3, Google Cloud Storage, Azure, or the memory of this process.

An object appears whole when the store has taken it, and stays: there is no directory to be made, and nothing to be made
durable later. What is published is put on a condition (that nothing is there, or still what was read), and where the
answer does not come, or says no, it is read back: a lost answer is neither success nor conflict. Bytes that are one's
own are told by their content, for every record that is published names its attempt.
"""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

from asyncckpt.errors import ConflictError, CorruptCheckpointError, StorageError
from asyncckpt.format import names
from asyncckpt.storage.cloud import Cloud
from asyncckpt.storage.holding import MachineHold, MachineHolds
from asyncckpt.storage.upload import MOST_PARTS, Upload
from asyncckpt.storage.urls import StorageOptions

COPY_LIMIT = 5 << 30
"""Bytes that S3 copies by itself; what is larger passes through here."""
_FIRST_WAIT, _LAST_WAIT = 0.05, 5.0
"""Seconds between tries to publish, drawn at random up to these."""

Version = dict[str, str]
"""What tells one state of an object from another: its e_tag, and a number where the store has one."""


class ObjectReadable:
    """An object, read by ranges."""

    def __init__(self, cloud: Cloud, key: str, size: int) -> None:
        self._cloud, self._key, self._size = cloud, key, size

    @property
    def size(self) -> int:
        return self._size

    def read_into(self, offset: int, buffer: memoryview) -> int:
        length = min(len(buffer), self._size - offset)
        if length <= 0:
            return 0
        read = self._cloud.api.get_range
        data = self._cloud.again(
            "read", self._key, lambda: read(self._cloud.store, self._key, start=offset, length=length)
        )
        buffer[: len(data)] = memoryview(data)
        return len(data)

    def close(self) -> None:
        pass


class ObjectStorage:
    """Checkpoints below `url`.

    Raises:
        ValueError, StorageError, NotSupportedError: see `Cloud`.
    """

    def __init__(self, url: str, options: StorageOptions = StorageOptions()) -> None:  # noqa: B008
        self._options = options
        self._cloud = Cloud(url, options)
        self._api, self._store = self._cloud.api, self._cloud.store
        self.holds = MachineHolds(self.url)

    @property
    def url(self) -> str:
        return self._cloud.url

    def __repr__(self) -> str:
        return f"ObjectStorage({self.url!r})"

    def impatient(self, timeout: float) -> ObjectStorage:
        """The same, by a client that gives a request up after `timeout` seconds, and all attempts after twice that."""
        client = {**(self._options.values.get("client_options") or {}), "timeout": timeout}
        retry = {**(self._options.values.get("retry_config") or {}), "retry_timeout": timeout}
        values = {**self._options.values, "client_options": client, "retry_config": retry}
        return ObjectStorage(self.url, StorageOptions(values))

    def path(self, key: str) -> str:
        return f"{self.url}/{key}" if key else self.url

    # Reading

    def list(self, prefix: str) -> list[str]:
        look = self._api.list_with_delimiter
        found = self._cloud.again("list", prefix, lambda: look(self._store, prefix or None))
        paths = [*found["common_prefixes"], *(item["path"] for item in found["objects"])]
        folder = f"{prefix}/" if prefix else ""
        # some stores have an object for the folder itself
        return [path.removeprefix(folder) for path in paths if path not in (prefix, folder)]

    def read(self, key: str, limit: int) -> bytes:
        return self._read(key, limit)[0]

    def look(self, key: str, limit: int) -> tuple[bytes, Version] | None:
        """The object and which state of it that is, for `put_if`; None where there is none. Raises as `read` does."""
        try:
            return self._read(key, limit)
        except FileNotFoundError:
            return None

    def _read(self, key: str, limit: int) -> tuple[bytes, Version]:
        def get() -> tuple[bytes, Any]:
            found = self._api.get(self._store, key)
            return bytes(found.bytes()) if found.meta["size"] <= limit else b"", found.meta

        data, meta = self._cloud.again("read", key, get)
        size = meta["size"]
        if size > limit:
            raise CorruptCheckpointError(f"{self.path(key)}: {size} bytes where at most {limit} can be right")
        if len(data) != size:
            raise CorruptCheckpointError(f"{self.path(key)}: shorter than its size of {size} bytes")
        return data, _version(meta)

    def open(self, key: str, *, cached: bool = True) -> ObjectReadable:
        return ObjectReadable(self._cloud, key, self._head(key)["size"])

    def _head(self, key: str) -> Any:
        return self._cloud.again("look at", key, lambda: self._api.head(self._store, key))

    # Writing

    def begin(self, folder: str, *, shared: bool = False) -> None:
        pass  # there are no folders

    def create(self, key: str, size: int, *, steady: bool = False) -> Upload:
        return Upload(self._cloud, key, size, steady and not self._cloud.keeps_memory)

    def share(self, source: str, key: str) -> None:
        """A copy that the store makes. It is whole on return."""
        size = self._head(source)["size"]
        try:
            self._head(key)
        except FileNotFoundError:
            pass
        else:
            raise FileExistsError(errno.EEXIST, "there is such an object", self.path(key))

        def copy() -> None:
            if size <= COPY_LIMIT:
                self._api.copy(self._store, source, key)
            else:
                stream = self._api.get(self._store, source).stream(min_chunk_size=16 << 20)
                part = max(16 << 20, -(-size // MOST_PARTS))
                self._api.put(self._store, key, stream, use_multipart=True, chunk_size=part, max_concurrency=4)

        self._cloud.again("copy", key, copy)

    def put(self, key: str, data: bytes) -> None:
        self._cloud.again("write", key, lambda: self._api.put(self._store, key, data, use_multipart=False))

    def settle(self, folder: str) -> None:
        pass  # what the store has taken is durable

    def publish(self, key: str, data: bytes, *, replace: bool) -> None:
        """With `replace`, `ConflictError` where somebody else has changed the object while this was under way."""
        before = self._version_of(key) if replace else None
        if self.put_if(key, data, before) is not None:
            return
        if not replace:
            raise FileExistsError(errno.EEXIST, "there is such an object", self.path(key))
        raise ConflictError(f"{self.path(key)} was changed by another writer meanwhile; it was left as that made it")

    def update(self, key: str, limit: int, change: Callable[[bytes | None], bytes]) -> None:
        for _ in self._tries():
            there = self.look(key, limit)
            data, version = (None, None) if there is None else there
            if self.put_if(key, change(data), version) is not None:
                return
        raise StorageError(f"can't update {self.path(key)}: others change it again and again", retryable=True)

    def put_if(self, key: str, data: bytes, version: Version | None) -> Version | None:
        """Put `data`, which nobody else would, where the object is at `version` (None: where there is none).

        Returns its version then. None: it is at another, and was not touched.

        Raises:
            StorageError: whether it was put could not be found out, or the store refuses.
        """
        mode = "create" if version is None else version
        refusals = (self._api.exceptions.AlreadyExistsError, self._api.exceptions.PreconditionError)
        error: BaseException | None = None
        for _ in self._tries():
            try:
                return _version(self._api.put(self._store, key, data, mode=mode, use_multipart=False))
            except refusals as raised:
                error = raised  # maybe of the second try of what was taken at the first
            except (self._api.exceptions.BaseError, OSError) as raised:
                error = raised
                if not isinstance(raised, FileNotFoundError) and not self._cloud.may_go_away(raised):
                    with self._cloud.named("publish", key):
                        raise
            there = self._peek(key, data)
            if there is not None and there[0]:
                return there[1]
            if (None if there is None else there[1]) != version:
                return None
        why = "" if error is None else f": {self._cloud.cause(error)}"
        raise StorageError(
            f"can't publish {self.path(key)}{why}. What became of the last try is not known: it may appear yet.",
            retryable=True,
            errno=errno.EAGAIN,
        )

    def _peek(self, key: str, data: bytes) -> tuple[bool, Version] | None:
        """Whether the object is `data`, and its version; None where there is none."""
        try:
            meta = self._head(key)
            if meta["size"] != len(data):
                return False, _version(meta)
            found, version = self._read(key, len(data))
        except FileNotFoundError:
            return None
        except CorruptCheckpointError:
            return False, {}
        return found == data, version

    def _version_of(self, key: str) -> Version | None:
        try:
            return _version(self._head(key))
        except FileNotFoundError:
            return None

    def _tries(self) -> Iterator[None]:
        """Turns, with waits drawn at random between them, for as long as a request may take with all its attempts."""
        deadline, longest = time.monotonic() + self._cloud.patience, _FIRST_WAIT
        while True:
            yield
            wait = random.uniform(0, longest)
            longest = min(2 * longest, _LAST_WAIT)
            if time.monotonic() + wait > deadline:
                return
            time.sleep(wait)

    # Deleting

    def delete(self, key: str) -> None:
        try:
            self._cloud.again("delete", key, lambda: self._api.delete(self._store, key))
        except FileNotFoundError:
            pass

    def remove_folder(self, folder: str) -> None:
        there = self.list(folder)
        ours = [n for n in there if names.is_temporary(n) or ("/" in folder and names.is_data_file(n))]
        for name in ours:
            self.delete(f"{folder}/{name}")
        if ours == there:
            self.delete(folder)  # a store that has folders keeps them, empty as they are

    def hold(self, folder: str, *, exclusive: bool = False, wait: bool = True) -> MachineHold | None:
        if folder and not self.list(folder):
            raise FileNotFoundError(errno.ENOENT, "there is nothing", self.path(folder))
        return self.holds.hold(folder, exclusive=exclusive, wait=wait)

    def free_bytes(self) -> None:
        return None


def _version(meta: Any) -> Version:
    """Of what obstore says of an object."""
    return {name: meta[name] for name in ("e_tag", "version") if meta.get(name)}
