"""Rounds: every rank comes with an offer, rank 0 decides, and all get the same verdict, or all get an error in time.

Over torch's store rather than by collectives, for these have no deadline of their own: a rank that is dead or stopped
must not hold the others for longer than was agreed. On the training thread only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec
import torch.distributed as dist

from asyncckpt.distributed.group import Group
from asyncckpt.errors import RankError
from asyncckpt.write.messages import Fault

log = logging.getLogger("asyncckpt")
Offer = TypeVar("Offer")
Verdict = TypeVar("Verdict")
_FIRST_PAUSE, _LAST_PAUSE = 0.0002, 0.02
"""Seconds between looks into the store: they become longer by half each time."""


class _Brought(msgspec.Struct):
    what: str
    body: msgspec.Raw


class _Decided(msgspec.Struct):
    body: msgspec.Raw = msgspec.Raw(b"\xc0")
    fault: Fault | None = None
    late: bool = False


class _Nothing(msgspec.Struct):
    pass


class LateRankError(RankError):
    """A rank did not come in time."""


class StoreLost(Exception):
    """The store can't be reached."""


class Council:
    """`patience` is for how many seconds a rank waits for the others."""

    def __init__(self, group: Group, patience: float) -> None:
        self.group, self.patience = group, patience
        self._store = group.connection()
        self._round = 0
        self._old: list[str] = []

    def agree(
        self, what: str, offer: Offer, decide: Callable[[Sequence[Offer]], Verdict], verdict: type[Verdict]
    ) -> Verdict:
        """What rank 0's `decide` makes of the offers of all ranks, which are in the order of the ranks.

        `what` says to a person what is agreed on; all must be at the same.

        Raises:
            LateRankError: a rank did not come in time.
            CheckpointError: what `decide` raised, on every rank.
            RankError: the store can't be reached, or some ranks are at something else.
        """
        self._round += 1
        body = msgspec.msgpack.encode(_Brought(what, msgspec.Raw(msgspec.msgpack.encode(offer))))
        try:
            if self.group.rank:
                self._store.set(self._key(self.group.rank), body)
                return self._hear(what, verdict)
            return self._lead(what, offer, decide)
        except (StoreLost, dist.DistError) as error:
            raise RankError(
                f"{what}: the store that the ranks share can't be reached ({error}). Has the process that keeps it, "
                "rank 0 or torchrun, ended?"
            ) from error

    def at_rank_0(self, what: str, do: Callable[[], None]) -> None:
        """Let rank 0 do something, when all ranks have come to it; it has done it, or raised, on return of all."""

        def decide(offers: object) -> _Nothing:
            do()
            return _Nothing()

        self.agree(what, _Nothing(), decide, _Nothing)

    def rank_0_says(self, what: str, wish: Offer) -> Offer | None:
        """What rank 0 wishes, on all ranks; None where a rank does not come in time."""
        try:
            return self.agree(what, wish, lambda wishes: wishes[0], type(wish))
        except LateRankError as error:
            log.warning("%s", error)
            return None

    def _key(self, who: object) -> str:
        return f"round/{self._round}/{who}"

    # Rank 0

    def _lead(self, what: str, offer: Offer, decide: Callable[[Sequence[Offer]], Verdict]) -> Verdict:
        try:
            made = decide(self._collect(what, offer))
        except LateRankError as error:
            self._announce(_Decided(fault=Fault.of(error), late=True))
            raise
        except BaseException as error:
            self._announce(_Decided(fault=Fault.of(error)))
            raise
        self._announce(_Decided(body=msgspec.Raw(msgspec.msgpack.encode(made))))
        return made

    def _collect(self, what: str, offer: Offer) -> list[Offer]:
        keys = [self._key(rank) for rank in self.group.others]
        if not wait_for(self._store, keys, self.patience):
            missing = [r for r, key in zip(self.group.others, keys, strict=True) if not self._store.check([key])]
            if missing:
                raise LateRankError(self._late(what, missing), rank=missing[0])
        if self._store.check([self._key("left")]):
            raise LateRankError(f"{what}: rank 0 came too late, and others did not wait for it", rank=0)
        offers = [offer]
        for rank, key in zip(self.group.others, keys, strict=True):
            brought = msgspec.msgpack.decode(self._store.get(key), type=_Brought)
            if brought.what != what:
                raise RankError(
                    f"the ranks are not at the same: rank 0 at {what}, rank {rank} at {brought.what}. All ranks must "
                    "call save, restore, delete and close in the same order, with the same steps.",
                    rank=rank,
                )
            offers.append(msgspec.msgpack.decode(brought.body, type=type(offer)))
        for key in self._old:
            self._store.delete_key(key)
        self._old = [*keys, self._key("verdict")]  # read by all when they have come to the next round
        return offers

    def _late(self, what: str, missing: list[int]) -> str:
        whom = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing[:10]))}"
        return f"{what}: {whom} did not come within {self.patience:g} s. Is it dead, stopped, or at something else?"

    def _announce(self, decided: _Decided) -> None:
        self._store.set(self._key("verdict"), msgspec.msgpack.encode(decided))

    # The others

    def _hear(self, what: str, verdict: type[Verdict]) -> Verdict:
        key = self._key("verdict")
        patience = self.patience + max(2.0, self.patience / 10)  # rank 0 may have begun to wait a little later
        if not wait_for(self._store, [key], patience):
            self._store.set(self._key("left"), b"")
            raise LateRankError(f"{what}: rank 0 did not answer within {patience:g} s. Is it dead or stopped?", rank=0)
        decided = msgspec.msgpack.decode(self._store.get(key), type=_Decided)
        if decided.fault is None:
            return msgspec.msgpack.decode(decided.body, type=verdict)
        error = decided.fault.error()
        raise LateRankError(str(error), rank=getattr(error, "rank", None)) if decided.late else error


def wait_for(store: Any, keys: list[str], seconds: float) -> bool:
    """Whether all `keys` are set within `seconds`. Signals are handled meanwhile: none is while torch's store waits.

    Raises:
        StoreLost: the store can't be reached.
    """
    deadline, pause = time.monotonic() + seconds, _FIRST_PAUSE
    try:
        while not store.check(keys):
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(pause, left))
            pause = min(1.5 * pause, _LAST_PAUSE)
    except RuntimeError as error:
        raise StoreLost(str(error)) from error
    return True
