"""The contract between the library and a place to keep checkpoints.

Keys are relative paths with `/`. The order of calls that commits a checkpoint is the same everywhere:

    begin(folder) -> create(key, size) -> write_at ... finish -> put(record) -> settle(folder) -> publish(manifest)

Every method raises `StorageError` when the storage fails, and `FileNotFoundError` where it says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class WritableFile(Protocol):
    def write_at(self, offset: int, data: memoryview) -> None:
        """Write `data` at `offset`, a multiple of 4096 bytes. Called from several threads at once."""

    def finish(self, size: int | None = None) -> None:
        """Return only when the bytes are durable: as many as `create` was told, or `size`."""

    def abort(self) -> None:
        """Give the file up; never raises."""


class ReadableFile(Protocol):
    @property
    def size(self) -> int: ...

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill `buffer` from `offset` on; fewer bytes only at the end of the file."""

    def close(self) -> None: ...


class Hold(Protocol):
    """A folder that is held; a context manager, which lets go at its end."""

    def close(self) -> None:
        """Let go. A second call does nothing."""

    def __enter__(self) -> Hold: ...

    def __exit__(self, *error: object) -> None: ...


class Storage(Protocol):
    @property
    def url(self) -> str:
        """How a person names this place."""

    def list(self, prefix: str) -> list[str]:
        """Names directly below the folder `prefix`; empty where it does not exist or is reached by a link."""

    def read(self, key: str, limit: int) -> bytes:
        """The whole object. `FileNotFoundError` where there is none, `CorruptCheckpointError` above `limit` bytes."""

    def open(self, key: str, *, cached: bool = True) -> ReadableFile:
        """`FileNotFoundError` where there is none. Without `cached`, bytes that the system holds in memory are not
        taken from there, but read again."""

    def begin(self, folder: str, *, shared: bool = False) -> None:
        """Make room for an attempt under a folder that no attempt has used; if it is `shared`, others of the same
        attempt may have made it already."""

    def create(self, key: str, size: int, *, steady: bool = False) -> WritableFile:
        """A new file of `size` bytes. `steady`: the memory that is given to `write_at` stays as it is until the file is
        finished, or of no use any more, so that no copy of it need be taken."""

    def share(self, source: str, key: str) -> None:
        """Let `key` appear with the bytes of `source`, which stay though `source` is deleted; durable by `settle`.

        `FileNotFoundError` where there is no `source`, `FileExistsError` where there is a `key`.
        """

    def put(self, key: str, data: bytes) -> None:
        """A new small file, durable on return."""

    def settle(self, folder: str) -> None:
        """Return only when all names on the way to the files of `folder`, which exists, are durable as they are."""

    def publish(self, key: str, data: bytes, *, replace: bool) -> None:
        """Let `key` appear with `data`, atomically and durably.

        With `replace` it takes the place of what is there, which stays readable until then; without,
        `FileExistsError` where something is there.
        """

    def update(self, key: str, limit: int, change: Callable[[bytes | None], bytes]) -> None:
        """Publish what `change` makes of the object, or of None where there is none; it may be called again.

        Where writers on several machines share the storage, of two at a time neither is lost. Elsewhere the caller
        sees to that. Raises as `read` does, and what `change` raises.
        """

    def delete(self, key: str) -> None:
        """Return only when the object is durably gone, whether it was there or not."""

    def remove_folder(self, folder: str) -> None:
        """Remove from one folder what the grammar allows there (data files only in that of an attempt).

        Then the folder, where that left it empty. What is foreign stays, without an error.
        """

    def hold(self, folder: str, *, exclusive: bool = False, wait: bool = True) -> Hold | None:
        """Hold `folder`, together with others, or `exclusive` of them: for what reads, and for what removes.

        It is let go of when the holder's process ends, however it ends. `None` where others hold it in a way that
        excludes this and it is not to `wait`. `FileNotFoundError` where there is no such folder. Processes of other
        machines may not be seen.
        """

    def free_bytes(self) -> int | None:
        """Room that is left, where that is known."""
