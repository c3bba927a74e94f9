"""Bugs to be planted on the trainer's side, where torch is: see `planted`."""

from __future__ import annotations

import atexit
from collections.abc import Iterable
from typing import Any

import pytest

from asyncckpt import checkpointer, fetching, link, signals
from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.handle import SaveHandle
from asyncckpt.policy.codec import Rates
from asyncckpt.read import select
from asyncckpt.session import Session
from asyncckpt.snapshot import arena
from asyncckpt.snapshot.arena import ArenaPool
from asyncckpt.snapshot.snapshotter import Snapshot, Snapshotter
from asyncckpt.snapshot.torn import Look
from asyncckpt.taken import TakenSteps
from asyncckpt.write import messages as m


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


def nothing_when_all_are_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    def newest(catalog: Any, read: Any) -> Any:
        try:
            return select.newest(catalog, read)
        except CorruptCheckpointError:
            return None, {}

    monkeypatch.setattr(fetching, "newest", newest)


def fence_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Snapshot, "fence", lambda self: None)


def all_is_copied_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Snapshotter, "_may_wait", lambda self, name, source, owned: True)


def tears_not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Look, "changed", lambda self: ())


def leaving_does_not_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    atexit.unregister(checkpointer._leave_all)


def forked_child_not_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SaveHandle, "_check_process", lambda self: None)


def second_signal_not_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    arrived = signals._Handler.arrived
    monkeypatch.setattr(signals._Handler, "arrived", lambda self: arrived(self) if self._first is None else None)


def handler_before_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    def heard(self: signals._Handler, number: int, frame: Any) -> None:
        for listener in self.listeners:
            listener.note(number)

    monkeypatch.setattr(signals._Handler, "__call__", heard)


def memory_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "available_memory", lambda: None)


def arenas_never_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ArenaPool, "give_back", lambda self, arena: self._leased.pop(arena.id, None))


def storage_looked_at_by_every_save(monkeypatch: pytest.MonkeyPatch) -> None:
    may_replace = TakenSteps.may_replace

    def look_first(self: TakenSteps, step: int, overwrite: bool, in_flight: Iterable[SaveHandle]) -> bool:
        self._run.exists(step)
        return may_replace(self, step, overwrite, in_flight)

    monkeypatch.setattr(TakenSteps, "may_replace", look_first)


def hung_storage_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link.Patience, "wait", lambda self, changed, seconds=None: changed.wait(seconds) and None)
