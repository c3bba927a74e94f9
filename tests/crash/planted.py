"""Bugs to be planted into the package, each by replacing the one function that it would be in. Torch-free: what has to
be planted on the other side is in `planted_face`."""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from asyncckpt.catalog.custody import Custody
from asyncckpt.catalog.ownership import RunLock
from asyncckpt.errors import CorruptCheckpointError, StorageError
from asyncckpt.format import manifest, names
from asyncckpt.format.image import Entry
from asyncckpt.policy import keep
from asyncckpt.policy.records import Record
from asyncckpt.read import reader
from asyncckpt.read.pieces import PieceReader
from asyncckpt.storage.files import LocalWritable
from asyncckpt.storage.local import LocalStorage
from asyncckpt.storage.posix import Posix
from asyncckpt.testing import PosixWrapper
from asyncckpt.write import client, pipeline, ranks
from asyncckpt.write.committing import Committer
from asyncckpt.write.copying import StepCopy
from asyncckpt.write.mirror import Mirror
from asyncckpt.write.raw import RawPart
from asyncckpt.write.service import Service

Plant = Callable[[pytest.MonkeyPatch], None]


@contextmanager
def deaf(storage: LocalStorage, *verbs: str) -> Iterator[None]:
    """While inside, `storage` leaves these verbs out."""

    class Deaf(PosixWrapper):
        def around(self, verb: str, arguments: tuple[Any, ...], call: Callable[..., Any]) -> Any:
            return None if verb in verbs else call(*arguments)

    storage.posix, real = Deaf(storage.posix), storage.posix
    try:
        yield
    finally:
        storage.posix = real


def without(method: str, *verbs: str) -> Plant:
    """`LocalStorage.method` leaves these verbs out."""
    real = getattr(LocalStorage, method)

    def mutant(self: LocalStorage, *args: Any, **options: Any) -> Any:
        with deaf(self, *verbs):
            return real(self, *args, **options)

    return lambda monkeypatch: monkeypatch.setattr(LocalStorage, method, mutant)


def no_data_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    def finish(self: LocalWritable, size: int | None = None) -> None:
        self._posix.truncate(self._fd, self._size if size is None else size)
        self.abort()

    monkeypatch.setattr(LocalWritable, "finish", finish)


def manifest_before_data(monkeypatch: pytest.MonkeyPatch) -> None:
    later: list[LocalWritable] = []
    finish, publish = LocalWritable.finish, LocalStorage.publish

    def publish_first(self: LocalStorage, *args: Any, **options: Any) -> None:
        publish(self, *args, **options)
        while later:
            finish(later.pop())

    monkeypatch.setattr(LocalWritable, "finish", lambda self: later.append(self))
    monkeypatch.setattr(LocalStorage, "publish", publish_first)


def not_durable(name: str) -> Plant:
    """Records of this name are published without an fsync of their directory."""
    publish = LocalStorage.publish

    def publish_carelessly(self: LocalStorage, key: str, data: bytes, *, replace: bool) -> None:
        with deaf(self, *(["fsync_dir"] if key.endswith(name) else [])):
            publish(self, key, data, replace=replace)

    return lambda monkeypatch: monkeypatch.setattr(LocalStorage, "publish", publish_carelessly)


def pins_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    held = keep._held
    monkeypatch.setattr(keep, "_held", lambda records: held([replace(record, pinned=False) for record in records]))
    monkeypatch.setattr(Custody, "_check_unpinned", lambda self, step: None)


def retention_before_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    publish = Committer._publish

    def retire_first(self: Committer, custody: Custody, save: pipeline.Save, prepared: pipeline.Prepared) -> Any:
        assert custody.keep is not None
        for step in custody.keep.retire([*custody.catalog.records(), Record(save.begin.step)]):
            custody.delete(step)
        return publish(self, custody, save, prepared)

    monkeypatch.setattr(Committer, "_publish", retire_first)


def bytes_before_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    delete = Custody.delete

    def remove_first(self: Custody, step: int, **options: Any) -> None:
        attempt = self.attempt_of(step)
        self.storage.remove_folder(f"{names.step_name(step)}/{attempt}")
        delete(self, step, **options)

    monkeypatch.setattr(Custody, "delete", remove_first)


def recycled_before_the_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    delete = Custody.delete

    def recycle_first(self: Custody, step: int, *, recycled: str = "") -> None:
        if recycled:
            self.recycle(f"{names.step_name(step)}/{recycled}")
        delete(self, step)

    monkeypatch.setattr(Custody, "delete", recycle_first)


def mirrored_before_it_is_durable(monkeypatch: pytest.MonkeyPatch) -> None:
    settle = LocalStorage.settle

    def settle_carelessly(self: LocalStorage, folder: str) -> None:
        with deaf(self, *(["fsync_dir"] if self.root.endswith("mirror") else [])):
            settle(self, folder)

    monkeypatch.setattr(LocalStorage, "settle", settle_carelessly)


def told_mirrored_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    publish = Mirror._publish

    def publish_carelessly(self: Mirror, *args: Any) -> Any:
        assert isinstance(self._target, LocalStorage)
        with deaf(self._target, "fsync_dir"):
            return publish(self, *args)

    monkeypatch.setattr(Mirror, "_publish", publish_carelessly)


def mirrored_files_taken_for_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    copy_step = StepCopy.copy

    async def copy(self: StepCopy, known: set[str], *args: Any) -> None:
        await copy_step(self, set(self.manifest.files), *args)

    monkeypatch.setattr(StepCopy, "copy", copy)


def mirrored_files_noted_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    copy_part = StepCopy._copy_part

    async def copy(self: StepCopy, record: Any, whole: set[str], shared: Any, finished: Any) -> None:
        for name in record.data_files:
            await finished(name)
        await copy_part(self, record, whole, shared, finished)

    monkeypatch.setattr(StepCopy, "_copy_part", copy)


def mirror_goes_on_with_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mirror, "_lacking", lambda self, custody: [])


def temporary_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(self: Posix, path: str, direct: bool) -> int:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    monkeypatch.setattr(names, "temporary", lambda name: f".{name}.tmp")
    monkeypatch.setattr(Posix, "create", create)


def fsync_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    def finish(self: LocalWritable, size: int | None = None) -> None:
        self._posix.truncate(self._fd, self._size if size is None else size)
        try:
            self._posix.fsync(self._fd)
        except OSError:
            self._posix.fsync(self._fd)
        self.abort()

    monkeypatch.setattr(LocalWritable, "finish", finish)


def worker_error_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    write = RawPart.write

    def write_carelessly(self: RawPart, index: int, data: memoryview, found: str) -> None:
        with contextlib.suppress(StorageError):
            write(self, index, data, found)

    monkeypatch.setattr(RawPart, "write", write_carelessly)


def overwrite_unlinks_first(monkeypatch: pytest.MonkeyPatch) -> None:
    publish = LocalStorage.publish

    def unlink_first(self: LocalStorage, key: str, data: bytes, *, replace: bool) -> None:
        if replace:
            self.delete(key)
        publish(self, key, data, replace=False)

    monkeypatch.setattr(LocalStorage, "publish", unlink_first)


def rank_record_not_durable(monkeypatch: pytest.MonkeyPatch) -> None:
    publish = LocalStorage.publish

    def publish_carelessly(self: LocalStorage, key: str, data: bytes, *, replace: bool) -> None:
        with deaf(self, *(["fsync", "fsync_dir"] if "/rank-" in key else [])):
            publish(self, key, data, replace=replace)

    monkeypatch.setattr(LocalStorage, "publish", publish_carelessly)


def ranks_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    look = ranks.Share._look

    def look_at_one(self: ranks.Share, which: set[int]) -> dict[int, bytes]:
        found = look(self, {0})
        which -= which - found.keys()
        return {rank: found[rank] for rank in which}

    monkeypatch.setattr(ranks.Share, "_look", look_at_one)


def digest_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(self: PieceReader, index: int, target: memoryview, bench: Any) -> None:
        self._fetch(index, self._part.pieces(index)[0], target)

    monkeypatch.setattr(PieceReader, "read_into", read)


def deleted_though_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Custody, "_alone", lambda self, folder: self.storage.hold(folder))


def leftovers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Custody, "sweep", lambda self: None)


def run_not_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunLock, "_try", staticmethod(lambda directory: os.open(directory, os.O_RDONLY)))


def writer_left_over_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    acquire = RunLock.acquire
    monkeypatch.setattr(RunLock, "acquire", lambda directory, timeout, cancelled=None: acquire(directory, 0.0))


def staged_given_up_with_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    orphaned = Service.orphaned

    def give_up(self: Service) -> None:
        for save in self._saves.values():
            save.seal = None
        orphaned(self)

    monkeypatch.setattr(Service, "orphaned", give_up)


def writer_in_the_trainers_group(monkeypatch: pytest.MonkeyPatch) -> None:
    start = subprocess.Popen
    popen = lambda *args, start_new_session=False, **options: start(*args, **options)  # noqa: E731
    monkeypatch.setattr(client, "subprocess", SimpleNamespace(Popen=popen, DEVNULL=subprocess.DEVNULL))


def trainers_end_told_by_the_link_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_pidfd", lambda pid, closing: None)


def seal_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def unseal(data: bytes, record_type: Any, what: str) -> Any:
        try:
            return msgspec.json.decode(data.rpartition(b',"sha256":"')[0] + b"}", type=record_type)
        except (ValueError, msgspec.MsgspecError) as error:
            raise CorruptCheckpointError(f"{what}: {error}") from error

    monkeypatch.setattr(manifest, "unseal", unseal)


def header_taken_at_its_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "header_size", lambda first, size: 8 + struct.unpack("<Q", first[:8])[0])


def offsets_taken_at_their_word(monkeypatch: pytest.MonkeyPatch) -> None:
    def parse_header(header: bytes, size: int) -> Any:
        table = msgspec.json.decode(header[8:])
        table.pop("__metadata__", None)
        entries = {}
        for name, item in table.items():
            start, end = item["data_offsets"]
            entries[name] = Entry(name, item["dtype"], tuple(item["shape"]), len(header) + start, end - start)
        return entries

    monkeypatch.setattr(reader, "parse_header", parse_header)


def links_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Posix, "open", lambda self, path, direct: os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    monkeypatch.setattr(LocalStorage, "_refuse_links", lambda self, key: None)


def files_for_all_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    monkeypatch.setattr(Posix, "create", lambda self, path, direct: os.open(path, flags, 0o644))
