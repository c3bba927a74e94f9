"""Alone, or one of several ranks: what of saving and restoring depends on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from asyncckpt.distributed.council import Council
from asyncckpt.distributed.group import Group
from asyncckpt.distributed.loading import Loading
from asyncckpt.distributed.mail import Mail, Word
from asyncckpt.distributed.notices import WORDS, Deed, Notices
from asyncckpt.distributed.offers import Move
from asyncckpt.distributed.opening import open_together
from asyncckpt.distributed.saving import Saves
from asyncckpt.errors import NotSupportedError
from asyncckpt.fetching import Loaded, Wish, fetch, read, sources
from asyncckpt.handle import SaveHandle
from asyncckpt.policy.cadence import Every
from asyncckpt.preemption import Notice, Preemption
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
    alone = True

    def __init__(self, run: Run) -> None:
        self._run = run
        self._heard: Callable[[Notice], None] = lambda notice: None

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

    def agreed(self, step: int, move: Move | None) -> Move:
        """What all do in a call of `maybe_save`, where this process would do `move`; None: it would not save."""
        return move or Move(False)

    def foresee(self) -> bool:
        """Whether the next `maybe_save` saves because of a notice that only all ranks together know of.

        Raises:
            NotSupportedError: only `agreed` can tell what all ranks would do.
        """
        return False

    # Notices to leave

    def listen(self, heard: Callable[[Notice], None]) -> None:
        """Call `heard`, on whatever thread, when there is a notice, for whichever rank; it goes on listening till the
        end."""
        self._heard = heard

    def given(self, notice: Notice) -> None:
        """This process has got a notice. On whatever thread."""
        self._heard(notice)

    def notice(self, own: Notice | None) -> Notice | None:
        """The notice that is to be answered now, where `own` is this process's."""
        return own

    def call(self) -> Deed:
        """`maybe_save` is called: `save` for a notice, where that is known by all, or `leave` without, or `go on`."""
        return "go on"

    def close(self) -> None:
        """Nothing comes any more."""


class Together(Company):
    """One of several ranks: what it does it does when all have come to it, or within `patience` seconds not at all."""

    alone = False

    def __init__(
        self,
        run: Run,
        group: Group,
        patience: float,
        settings: dict[str, str],
        cadences: Iterable[object],
        *,
        clocks: bool,
        grace: float | None,
    ) -> None:
        """`grace` is that of a preemption, where notices are listened for."""
        super().__init__(run)
        self.rank = group.rank
        self._group, self._settings = group, settings
        self._council = Council(group, patience)
        self._saves: Saves | None = None
        self._mail: Mail | None = None
        """From `open` on."""
        self._notices = None if grace is None else Notices(group, min(patience, grace), self._send)
        self._notice: Notice | None = None
        """What all have agreed to answer."""
        self._clocks = clocks
        self._by_step = all(isinstance(c, Every) and c.minutes is None for c in cadences)

    def open(self, make: Callable[[], Session]) -> Session:
        session = open_together(self._council, self._run.storage, self._settings, make, lambda made: made.close())
        self._saves = Saves(self._council, session, self._send)
        self._mail = Mail(self._group, self._take)
        self._mail.start()
        return session

    def _send(self, rank: int, word: Word) -> None:
        if self._mail is not None:
            self._mail.send(rank, word)

    def _take(self, word: Word) -> None:
        """A word has come, on a thread of the mail."""
        assert self._saves is not None
        if word.what not in WORDS:
            self._saves.hear(word)
        elif self._notices is not None:
            self._notices.take(word)

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
        view = View(state, self._group.rank, self._group.world, rename)

        catalog = self._run.catalog

        def read_here(step: int, stale: dict[str, int]) -> Filling:
            return Filling(read(catalog, step, wish, view, stale), state, wish.strict, rename)

        def choose(read_all: Callable[[int], Filling]) -> Loaded | None:
            return fetch(catalog, step, wish, one=lambda step: read_all(step).loaded)

        found = Loading(self._council, read_here, lambda step: sources(catalog, step, wish), rewind).run(choose)
        if found is None:
            return None
        filling, chosen = found
        filling.loaded = replace(filling.loaded, passed_over=chosen.passed_over, lacking=chosen.lacking)
        return filling

    def once(self, what: str, do: Callable[[], None]) -> None:
        self._council.at_rank_0(what, do)

    def agreed(self, step: int, move: Move | None) -> Move:
        """Rank 0's move counts, which is asked for where ranks may differ: by step, all know whether to save."""
        if self._by_step and (move is None or not (self._clocks or move.parting)):
            return move or Move(False)
        return self._council.rank_0_says(f"maybe_save of step {step}", move or Move(False)) or Move(False)

    def foresee(self) -> bool:
        if not self._by_step:
            raise NotSupportedError(
                "should_save: several ranks foresee only Every(steps=); with other cadences rank 0 decides when all "
                "call maybe_save"
            )
        return self._notices is not None and self._notices.foresee()

    def listen(self, heard: Callable[[Notice], None]) -> None:
        if self._notices is not None:
            self._notices.listen(lambda reason: heard(Notice(reason)))

    def given(self, notice: Notice) -> None:
        assert self._notices is not None
        self._notices.given(notice.reason)

    def notice(self, own: Notice | None) -> Notice | None:
        return self._notice

    def call(self) -> Deed:
        if self._notices is None:
            return "go on"
        deed = self._notices.call()
        if deed == "save":
            self._notice = Notice(*self._notices.first)
        return deed

    def close(self) -> None:
        if self._notices is not None:
            self._notices.close()
        if self._mail is not None:
            self._mail.close()


def company(
    run: Run,
    *,
    rank_timeout: float,
    settings: dict[str, str],
    cadence: object,
    clocks: Mapping[str, object],
    preempt: Preemption | None,
    when_full: str,
    mirrored: bool,
) -> Company:
    """Of the ranks of torch's default process group, where there is one of several; else of this process alone.

    Raises:
        NotSupportedError: `when_full` is something that several ranks can't have, or they are to be mirrored.
    """
    group = Group.default()
    if group is None:
        return Company(run)
    if mirrored:
        raise NotSupportedError("mirror= can't be had yet in a job of several ranks; leave it out")
    if when_full not in ("wait", "skip"):
        raise NotSupportedError(f"when_full={when_full!r}: several ranks can 'wait' or 'skip'")
    return Together(
        run,
        group,
        rank_timeout,
        {**settings, "parts=": ", ".join(clocks), "preempt=": "given" if preempt is not None else "not given"},
        [*clocks.values(), *([] if cadence is None else [cadence])],
        clocks=bool(clocks),
        grace=None if preempt is None else preempt.grace,
    )
