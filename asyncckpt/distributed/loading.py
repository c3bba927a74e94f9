"""One step for all ranks: rank 0 proposes, all read and verify what they need of it, and either all take it or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

import msgspec

from asyncckpt.distributed.council import Council
from asyncckpt.errors import CorruptCheckpointError, RankError
from asyncckpt.write.messages import Fault

Read = TypeVar("Read")


class _Vote(msgspec.Struct):
    """How a rank has fared with the step that was to be read. `damaged`: it is the step that is at fault."""

    fault: Fault | None = None
    damaged: bool = False


class Chosen(msgspec.Struct, frozen=True):
    """The step that all take, and what newer ones were not taken, as rank 0 has found them."""

    step: int
    passed_over: dict[int, str] = {}
    lacking: tuple[int, ...] = ()


class _Word(msgspec.Struct):
    """What comes next: `read` a step, with `stale` parts of older ones; what it was found to be, damaged if there is a
    reason; the end, perhaps with a step that is `chosen`."""

    what: str
    step: int = -1
    damaged: str = ""
    chosen: Chosen | None = None
    stale: dict[str, int] = {}


class Found(Protocol):
    @property
    def step(self) -> int: ...
    @property
    def passed_over(self) -> dict[int, str]: ...
    @property
    def lacking(self) -> tuple[int, ...]: ...


class Loading(Generic[Read]):
    """`read` reads what this rank needs of a step, some parts from older ones: rank 0 finds out which, by `sources`.

    Rank 0 does `then` when a step is to be taken by all.
    """

    def __init__(
        self,
        council: Council,
        read: Callable[[int, dict[str, int]], Read],
        sources: Callable[[int], dict[str, int]],
        then: Callable[[int], None],
    ) -> None:
        self._council, self._read, self._sources, self._then = council, read, sources, then
        self._result: Read | None = None
        self._error: Exception | None = None
        self._vote = _Vote()

    def run(self, choose: Callable[[Callable[[int], Read]], Found | None]) -> tuple[Read, Chosen] | None:
        """What `read` gave of the step that was chosen, and which that is; None where there is none to choose.

        On rank 0 `choose` finds the step; what it is given reads one on all ranks, and gives what `read` gave here.

        Raises:
            CheckpointError: what `choose` has raised.
            RankError: another rank can't read what this one can.
            Exception: what `read` has raised.
        """
        end = self._lead(choose) if self._council.group.rank == 0 else self._follow()
        if end.chosen is None:
            return None
        assert self._result is not None
        return self._result, end.chosen

    def _agree(self, decide: Callable[[Sequence[_Vote]], _Word]) -> _Word:
        return self._council.agree("restore", self._vote, decide, _Word)

    def _try(self, step: int, stale: dict[str, int]) -> None:
        self._vote, self._error, self._result = _Vote(), None, None
        try:
            self._result = self._read(step, stale)
        except Exception as error:
            self._error = error
            self._vote = _Vote(Fault.of(error), isinstance(error, CorruptCheckpointError))

    def _lead(self, choose: Callable[[Callable[[int], Read]], Found | None]) -> _Word:
        try:
            found = choose(self._read_all)
        except _ToldError as told:
            raise told.error from None
        except Exception as error:
            failure = error
            return self._agree(lambda votes: _raise(failure))
        chosen = None if found is None else Chosen(found.step, found.passed_over, found.lacking)

        def end(votes: Sequence[_Vote]) -> _Word:
            if chosen is not None:
                self._then(chosen.step)
            return _Word("end", chosen=chosen)

        return self._agree(end)

    def _read_all(self, step: int) -> Read:
        """Let every rank read `step`.

        Raises:
            CorruptCheckpointError: it is damaged, for whichever rank.
            CheckpointNotFoundError: it, or an older one that has what it lacks, does not exist.
        """
        stale = self._sources(step)
        self._agree(lambda votes: _Word("read", step, stale=stale))
        self._try(step, stale)
        try:
            word = self._agree(lambda votes: _judged(votes, step))
        except Exception as error:
            raise _ToldError(self._error or error) from error
        self._vote = _Vote()
        if word.damaged:
            raise CorruptCheckpointError(word.damaged, step=step)
        assert self._result is not None
        return self._result

    def _follow(self) -> _Word:
        while True:
            try:
                word = self._agree(_raise_unused)
            except RankError:
                if self._error is not None and not isinstance(self._error, CorruptCheckpointError):
                    raise self._error from None
                raise
            self._vote = _Vote()
            if word.what == "read":
                self._try(word.step, word.stale)
            elif word.what == "end":
                return word


def _judged(votes: Sequence[_Vote], step: int) -> _Word:
    for rank, vote in enumerate(votes):
        if vote.fault is not None and not vote.damaged:
            raise RankError(f"rank {rank} can't restore step {step}: {vote.fault.message}", rank=rank)
    damaged = [vote.fault.message for vote in votes if vote.fault is not None]
    return _Word("judged", step, damaged[0] if damaged else "")


class _ToldError(Exception):
    """The other ranks know of `error` already."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def _raise(error: Exception) -> _Word:
    raise error


def _raise_unused(votes: Sequence[_Vote]) -> _Word:
    raise AssertionError("only rank 0 decides")
