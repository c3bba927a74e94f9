"""The face of several ranks to the Checkpointer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import msgspec

from asyncckpt.dist.council import Council, LateRankError
from asyncckpt.dist.group import Group
from asyncckpt.dist.loading import Chosen, Found, Loading
from asyncckpt.dist.opening import open_together
from asyncckpt.dist.saving import Agreed, Handle, Saves, Session
from asyncckpt.snapshot.describe import Description
from asyncckpt.storage.base import Storage

log = logging.getLogger("asyncckpt")
Opened = TypeVar("Opened", bound=Session)
Read = TypeVar("Read")


class _Nothing(msgspec.Struct):
    pass


class _Says(msgspec.Struct):
    wish: bool


class Ranks:
    """This rank among the others. `patience` is for how many seconds they wait for each other."""

    def __init__(self, group: Group, patience: float) -> None:
        self.rank, self.world = group.rank, group.world
        self._council = Council(group, patience)
        self._saves: Saves | None = None

    def open(
        self, storage: Storage, settings: dict[str, str], make: Callable[[], Opened], undo: Callable[[Opened], None]
    ) -> Opened:
        """The session of this rank, once all ranks have theirs: see `open_together`."""
        session = open_together(self._council, storage, settings, make, undo)
        self._saves = Saves(self._council, session)
        return session

    def agree(
        self,
        handle: Handle,
        state: Mapping[str, Any],
        describe: Callable[[], Description],
        when_full: str,
        overwrite: bool,
        failed: Mapping[str, BaseException],
        raise_failed: Callable[[], None],
    ) -> Agreed | None:
        """Come to a save with all other ranks: see `Saves.agree`."""
        assert self._saves is not None
        return self._saves.agree(handle, state, describe, when_full, overwrite, failed, raise_failed)

    def launched(self, handle: Handle) -> None:
        assert self._saves is not None
        self._saves.launched(handle)

    def refused(self, handle: Handle, error: BaseException) -> None:
        assert self._saves is not None
        self._saves.refused(handle, error)

    def ready(self, attempt: str) -> None:
        if self._saves is not None:
            self._saves.ready(attempt)

    def ended(self, handle: Handle) -> None:
        if self._saves is not None:
            self._saves.ended(handle)

    def load(
        self,
        read: Callable[[int], Read],
        choose: Callable[[Callable[[int], Read]], Found | None],
        then: Callable[[int], None],
    ) -> tuple[Read, Chosen] | None:
        """One step for all ranks: see `Loading`."""
        return Loading(self._council, read, then).run(choose)

    def at_rank_0(self, what: str, do: Callable[[], None]) -> None:
        """Let rank 0 do something, when all ranks have come to it; it has done it, or raised, on return of all."""

        def decide(offers: object) -> _Nothing:
            do()
            return _Nothing()

        self._council.agree(what, _Nothing(), decide, _Nothing)

    def rank_0_says(self, what: str, wish: bool) -> bool:
        """What rank 0 wishes, on all ranks. A rank that does not come in time makes it False."""
        try:
            return self._council.agree(what, _Says(wish), lambda said: said[0], _Says).wish
        except LateRankError as error:
            log.warning("%s", error)
            return False

    def close(self) -> None:
        if self._saves is not None:
            self._saves.close()
