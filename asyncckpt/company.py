"""Alone, or one of several ranks: what of saving and restoring depends on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from asyncckpt.distributed.council import Council
from asyncckpt.distributed.group import Group
from asyncckpt.distributed.loading import Loading
from asyncckpt.distributed.opening import open_together
from asyncckpt.distributed.saving import Saves
from asyncckpt.errors import NotSupportedError
from asyncckpt.fetching import Loaded, Wish, fetch
from asyncckpt.handle import SaveHandle
from asyncckpt.policy.cadence import Every
from asyncckpt.run import Filling, Run
from asyncckpt.session import Session, WhenFull
from asyncckpt.snapshot.apply import Rename
from asyncckpt.snapshot.arena import Arena
from asyncckpt.snapshot.describe import Description
from asyncckpt.snapshot.view import View
from asyncckpt.write.messages import Member


@dataclass(frozen=True)
class Request:
    """A save that is asked for. `failed` are errors of earlier ones, to be raised first, which `raise_failed` does."""

    state: Mapping[str, Any]
    describe: Callable[[], Description]
    when_full: WhenFull
    overwrite: bool
    failed: list[BaseException]
    raise_failed: Callable[[], None]


@dataclass(frozen=True)
class Granted:
    """What is to be snapshotted, and where to."""

    what: Description
    arena: Arena
    member: Member | None = None


class Company:
    """A process alone. `rank` is that of this process."""

    rank = 0

    def __init__(self, run: Run) -> None:
        self._run = run

    def open(self, make: Callable[[], Session]) -> Session:
        """The session with the writer, which `make` gives."""
        return make()

    def grant(self, session: Session, handle: SaveHandle, asked: Request) -> Granted | None:
        """None: the save is not taken, and its handle says why."""
        if asked.failed:
            asked.raise_failed()
        what = asked.describe()
        arena = session.admit(handle, what.size, asked.when_full)
        if arena is None:
            session.skipped(handle)
            return None
        return Granted(what, arena)

    def launched(self, handle: SaveHandle) -> None:
        """The writer knows of it."""

    def refused(self, handle: SaveHandle, error: BaseException) -> None:
        """It was granted, perhaps, and has ended by an exception."""

    def ready(self, attempt: str) -> None:
        """What this rank writes of a save is durable."""

    def ended(self, handle: SaveHandle) -> None:
        """Its outcome is known."""

    def fetch(
        self,
        state: Mapping[str, Any],
        step: int | None,
        wish: Wish,
        rename: Rename | None,
        rewind: Callable[[int], None],
    ) -> Filling | None:
        """What `state` is to be filled with. `rewind` is called with the step when that is certain."""
        loaded = self._run.fetch(step, wish, View(state, rename=rename))
        if loaded is None:
            return None
        filling = Filling(loaded, state, wish.strict, rename)
        rewind(loaded.step)
        return filling

    def once(self, what: str, do: Callable[[], None]) -> None:
        """Do something that is done once for all ranks; `what` says to a person what it is."""
        do()

    def due(self, step: int, wish: bool) -> bool:
        """Whether all save `step`, where this process would."""
        return wish

    def check_foreseeable(self) -> None:
        """
        Raises:
            NotSupportedError: only `due` can tell what all ranks would do.
        """

    def close(self) -> None:
        """Nothing comes any more."""


class Together(Company):
    """One of several ranks: what it does it does when all have come to it, or within `patience` seconds not at all."""

    def __init__(self, run: Run, group: Group, patience: float, settings: dict[str, str], cadence: object) -> None:
        super().__init__(run)
        self.rank = group.rank
        self._group, self._settings = group, settings
        self._council = Council(group, patience)
        self._saves: Saves | None = None
        """From `open` on."""
        self._by_step = cadence is None or (isinstance(cadence, Every) and cadence.minutes is None)

    def open(self, make: Callable[[], Session]) -> Session:
        session = open_together(self._council, self._run.storage, self._settings, make, lambda made: made.close())
        self._saves = Saves(self._council, session)
        return session

    def grant(self, session: Session, handle: SaveHandle, asked: Request) -> Granted | None:
        assert self._saves is not None
        failed = {session.attempt_of(error) or f"#{i}": error for i, error in enumerate(asked.failed)}
        agreed = self._saves.agree(
            handle, asked.state, asked.describe, asked.when_full, asked.overwrite, failed, asked.raise_failed
        )
        if agreed is None:
            return None
        arena = session.admit(handle, agreed.what.size, "wait")
        assert arena is not None
        return Granted(agreed.what, arena, agreed.member)

    def launched(self, handle: SaveHandle) -> None:
        assert self._saves is not None
        self._saves.launched(handle)

    def refused(self, handle: SaveHandle, error: BaseException) -> None:
        assert self._saves is not None
        self._saves.refused(handle, error)

    def ready(self, attempt: str) -> None:
        if self._saves is not None:
            self._saves.ready(attempt)

    def ended(self, handle: SaveHandle) -> None:
        if self._saves is not None:
            self._saves.ended(handle)

    def fetch(
        self,
        state: Mapping[str, Any],
        step: int | None,
        wish: Wish,
        rename: Rename | None,
        rewind: Callable[[int], None],
    ) -> Filling | None:
        if wish.allow_stale:
            raise NotSupportedError("allow_stale= can't be had yet in a job of several ranks; leave it out")
        view = View(state, self._group.rank, self._group.world, rename)

        def read(step: int) -> Filling:
            loaded = self._run.fetch(step, wish, view)
            assert loaded is not None
            return Filling(loaded, state, wish.strict, rename)

        def choose(read_all: Callable[[int], Filling]) -> Loaded | None:
            return fetch(self._run.catalog, step, wish, one=lambda step: read_all(step).loaded)

        found = Loading(self._council, read, rewind).run(choose)
        if found is None:
            return None
        filling, chosen = found
        filling.loaded = replace(filling.loaded, passed_over=chosen.passed_over, lacking=chosen.lacking)
        return filling

    def once(self, what: str, do: Callable[[], None]) -> None:
        self._council.at_rank_0(what, do)

    def due(self, step: int, wish: bool) -> bool:
        return wish if self._by_step else self._council.rank_0_says(f"maybe_save of step {step}", wish)

    def check_foreseeable(self) -> None:
        if not self._by_step:
            raise NotSupportedError(
                "should_save: several ranks foresee only Every(steps=); with other cadences rank 0 decides when all "
                "call maybe_save"
            )

    def close(self) -> None:
        if self._saves is not None:
            self._saves.close()


def company(
    run: Run,
    *,
    rank_timeout: float,
    settings: dict[str, str],
    cadence: object,
    when_full: str,
    not_there: dict[str, bool],
) -> Company:
    """Of the ranks of torch's default process group, where there is one of several; else of this process alone.

    Raises:
        NotSupportedError: something is asked for that several ranks can't have yet.
    """
    group = Group.default()
    if group is None:
        return Company(run)
    for what, asked in not_there.items():
        if asked:
            raise NotSupportedError(f"{what} can't be had yet in a job of several ranks; leave it out")
    if when_full not in ("wait", "skip"):
        raise NotSupportedError(f"when_full={when_full!r}: several ranks can 'wait' or 'skip'")
    return Together(run, group, rank_timeout, settings, cadence)
