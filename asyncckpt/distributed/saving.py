"""One save of all ranks: agreed on before anything is copied, and followed to its end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from asyncckpt.distributed.council import Council, LateRankError
from asyncckpt.distributed.decide import Decider
from asyncckpt.distributed.mail import Word
from asyncckpt.distributed.offers import Item, Offer, Verdict
from asyncckpt.distributed.share import Sharer
from asyncckpt.errors import CheckpointError, RankError, TornSnapshotError
from asyncckpt.format import names
from asyncckpt.snapshot.describe import Description
from asyncckpt.write.messages import Fault, Member


class Handle(Protocol):
    """What is needed of a save's handle."""

    step: int
    attempt: str
    outcome: Any
    error: BaseException | None
    told: bool

    def finish(self, outcome: Literal["failed"], error: BaseException) -> None: ...


class Session(Protocol):
    """What is needed of the session with the writer of this rank; see there."""

    def wait_for_place(self, when_full: Any) -> bool: ...
    def skipped(self, handle: Any) -> None: ...
    def failed(self, handle: Any, error: BaseException) -> None: ...
    def reserve(self, step: int, attempt: str) -> None: ...
    def release(self, step: int, attempt: str) -> None: ...
    def look(self, attempt: str, committed: bool) -> None: ...
    def abort(self, attempt: str, error: CheckpointError) -> None: ...
    def tell(self, attempt: str) -> None: ...
    def rewind(self, step: int) -> None: ...
    def delete(self, step: int) -> None: ...


_REMEMBERED = 64
"""Words of failure that are kept: one may come before the save that it is of is launched here."""


@dataclass(frozen=True)
class Agreed:
    """What this rank is to snapshot, and what its writer must know."""

    what: Description
    member: Member


class Saves:
    """The saves of this rank among those of the others."""

    def __init__(self, council: Council, session: Session, send: Callable[[int, Word], None]) -> None:
        """`send` is the mail's; `hear` is to be called with what it brings."""
        self._council, self._session, self._send = council, session, send
        self._rank = council.group.rank
        self._sharer, self._decider = Sharer(self._rank), Decider()
        self._lock = threading.Lock()
        self._handles: dict[str, Handle] = {}
        self._aborted: dict[str, CheckpointError] = {}
        """Those that another rank has failed at, and that may not be known here yet, or not any more."""

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
        """Come to a save with all other ranks. None: it is not taken, or given up, as its handle says.

        `failed` are errors of earlier saves that are to be raised now, by attempt, and `raise_failed` does that.

        Raises:
            CheckpointError: an earlier save failed, on whichever rank. This one is not taken.
            Exception: what `describe` has raised.
            RankError: another rank can't save, or the ranks do not want to save the same.
        """
        what, fault, offer = None, None, Offer()
        items: list[Item] = []
        try:
            if failed:
                offer = Offer(failures={attempt: Fault.of(error) for attempt, error in failed.items()})
            else:
                what = describe()
                room = self._session.wait_for_place(when_full)
                offer, items = self._sharer.offer(what, state, overwrite, room)
        except Exception as error:
            fault, offer = error, Offer(fault=Fault.of(error))
        try:
            verdict = self._council.agree(f"save of step {handle.step}", offer, self._decide(handle.step), Verdict)
        except LateRankError as error:
            self._session.failed(handle, error)
            return None
        if fault is not None:
            raise fault
        if failed:
            raise_failed()
        self._raise_what_failed(verdict, handle.step)
        if verdict.skip or what is None:
            self._session.skipped(handle)
            return None
        handle.attempt = verdict.attempt
        with self._lock:
            self._handles[verdict.attempt] = handle
        group = self._council.group
        member = Member(group.rank, group.world, verdict.attempt, self._council.patience)
        return Agreed(self._sharer.share(what, items, offer, verdict), member)

    def _decide(self, step: int) -> Callable[[Any], Verdict]:
        def decide(offers: Any) -> Verdict:
            attempt = names.new_attempt()
            verdict = self._decider.decide(offers, attempt)
            if verdict.attempt:
                self._session.reserve(step, attempt)
            return verdict

        return decide

    def _raise_what_failed(self, verdict: Verdict, step: int) -> None:
        for attempt in verdict.failures:  # told now; where one is still on its way here, it is not told again
            self._session.tell(attempt)
        for fault in verdict.failures.values():
            raise RankError(f"an earlier save failed: {fault.message}")
        for rank, fault in verdict.faults.items():
            raise RankError(f"step {step} is not saved: rank {rank} can't: {fault.message}", rank=rank)

    def launched(self, handle: Handle) -> None:
        """The writer has been told of it: from now on it can be aborted."""
        with self._lock:
            error = self._aborted.pop(handle.attempt, None)
        if error is not None:
            self._session.abort(handle.attempt, error)

    def refused(self, handle: Handle, error: BaseException) -> None:
        """It has ended by an exception here: so it must for all, if it was agreed on and has not ended otherwise."""
        with self._lock:
            if handle.attempt not in self._handles:
                return
        if self._rank == 0:
            self._session.release(handle.step, handle.attempt)
        handle.told = True
        handle.finish("failed", error)
        self.ended(handle)

    # What happens to them

    def ready(self, attempt: str) -> None:
        """This rank is prepared."""
        if self._rank:
            self._send(0, Word(self._rank, "ready", attempt))

    def ended(self, handle: Handle) -> None:
        """Tell the other ranks how a save has ended here. From rank 0 it is final; from others failures matter."""
        attempt = handle.attempt
        with self._lock:
            if self._handles.pop(attempt, None) is None:
                return
        fault = None if handle.error is None else _fault(handle.error)
        word = Word(self._rank, "decided" if handle.outcome == "committed" else "failed", attempt, fault)
        if self._rank == 0:
            for rank in self._council.group.others:
                self._send(rank, word)
        elif word.what == "failed":
            self._send(0, word)

    def hear(self, word: Word) -> None:
        """A word of a save has come."""
        if word.what in ("ready", "decided"):
            self._session.look(word.attempt, committed=word.what == "decided")
            return
        error = _from(word)
        with self._lock:
            self._aborted[word.attempt] = error
            while len(self._aborted) > _REMEMBERED:
                del self._aborted[next(iter(self._aborted))]
        self._session.abort(word.attempt, error)


def _fault(error: BaseException) -> Fault:
    kind = "TornSnapshotError" if isinstance(error, TornSnapshotError) else "RankError"
    return Fault(kind, str(error), {})


def _from(word: Word) -> CheckpointError:
    message = f"rank {word.sender} failed: {word.fault.message if word.fault else 'its save was taken back'}"
    if word.fault is not None and word.fault.kind == "TornSnapshotError":
        return TornSnapshotError(message)
    return RankError(message, rank=word.sender)
