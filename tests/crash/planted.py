"""Bugs to be planted into the package, each by replacing the one function that it would be in."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from asyncckpt import fetching
from asyncckpt.catalog.custody import Custody
from asyncckpt.errors import CorruptCheckpointError, StorageError
from asyncckpt.format import names
from asyncckpt.policy import keep
from asyncckpt.policy.codec import Rates
from asyncckpt.policy.records import Record
from asyncckpt.read import select
from asyncckpt.read.pieces import PieceReader
from asyncckpt.session import Session
from asyncckpt.storage.files import LocalWritable
from asyncckpt.storage.local import LocalStorage
from asyncckpt.storage.posix import Posix
from asyncckpt.testing import PosixWrapper
from asyncckpt.write import messages as m
from asyncckpt.write import pipeline, ranks
from asyncckpt.write.parts import RawPart
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
    publish = Service._publish

    def retire_first(self: Service, custody: Custody, save: pipeline.Save, prepared: pipeline.Prepared) -> Any:
        assert custody.keep is not None
        for step in custody.keep.retire([*custody.catalog.records(), Record(save.begin.step)]):
            custody.delete(step)
        return publish(self, custody, save, prepared)

    monkeypatch.setattr(Service, "_publish", retire_first)


def bytes_before_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    delete = Custody.delete

    def remove_first(self: Custody, step: int) -> None:
        attempt = self.attempt_of(step)
        self.storage.remove_folder(f"{names.step_name(step)}/{attempt}")
        delete(self, step)

    monkeypatch.setattr(Custody, "delete", remove_first)


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

    def write_carelessly(self: RawPart, index: int, data: memoryview) -> None:
        with contextlib.suppress(StorageError):
            write(self, index, data)

    monkeypatch.setattr(RawPart, "write", write_carelessly)


def death_taken_for_done(monkeypatch: pytest.MonkeyPatch) -> None:
    def writer_ended(self: Session, reason: str) -> None:
        with self._changed:
            flights = [f for f in self._flights.values() if not f.released]
        for flight in flights:
            how = False, flight.size, "raw", Rates()
            self._settle(flight, m.Committed(flight.number, flight.size, 0.0, 0.0, 0.0, *how))

    monkeypatch.setattr(Session, "_writer_ended", writer_ended)


def leased_arena_given_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def land_when_copied(self: Session, flight: Any) -> None:
        if flight.copied and flight.number in self._flights:
            if flight.arena is not None:
                self._pool.give_back(flight.arena)
                flight.arena = None
            if flight.released:
                del self._flights[flight.number]
                self._changed.notify_all()

    monkeypatch.setattr(Session, "_land", land_when_copied)


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


def nothing_when_all_are_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    def newest(catalog: Any, read: Any) -> Any:
        try:
            return select.newest(catalog, read)
        except CorruptCheckpointError:
            return None, {}

    monkeypatch.setattr(fetching, "newest", newest)
