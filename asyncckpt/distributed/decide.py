"""What rank 0 makes of the offers of all ranks to save."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from asyncckpt.distributed.offers import Item, Loose, Offer, Verdict
from asyncckpt.distributed.planner import assign
from asyncckpt.errors import RankError
from asyncckpt.format.manifest import digest


class Decider:
    """Remembers what the ranks have, and which of it each stores."""

    def __init__(self) -> None:
        self._plans: list[str] = []
        self._items: dict[int, list[Item]] = {}
        self._owned: list[list[int]] = []
        self._version = ""

    def decide(self, offers: Sequence[Offer], attempt: str) -> Verdict:
        """One verdict for all; `attempt` is what the save is to be written under.

        Raises:
            RankError: the ranks do not want to save the same.
        """
        failures = {attempt: fault for offer in offers for attempt, fault in offer.failures.items()}
        faults = {rank: offer.fault for rank, offer in enumerate(offers) if offer.fault is not None}
        if failures or faults:
            return Verdict(failures=failures, faults=faults)
        _check_alike(offers)
        if not all(offer.room for offer in offers):
            return Verdict(skip=True)
        self._plan(offers)
        known = all(offer.version == self._version for offer in offers)
        return Verdict(
            attempt=attempt,
            version=self._version,
            owned=None if known else self._owned,
            same=[part for part in offers[0].parts if len({offer.trees[part] for offer in offers}) == 1],
            assigned=_assign_loose(offers),
        )

    def _plan(self, offers: Sequence[Offer]) -> None:
        self._items |= {rank: offer.items for rank, offer in enumerate(offers) if offer.items is not None}
        plans = [offer.plan for offer in offers]
        if plans != self._plans:
            self._owned = assign([self._items[rank] for rank in range(len(offers))])
            self._plans = plans
            self._version = digest(msgspec.msgpack.encode((plans, self._owned)))


def _check_alike(offers: Sequence[Offer]) -> None:
    first = offers[0]
    for rank, offer in enumerate(offers):
        if offer.parts != first.parts or offer.omitted != first.omitted:
            raise RankError(
                f"rank 0 saves the parts {', '.join(first.parts)}, and rank {rank} {', '.join(offer.parts)}. All "
                "ranks must give states with the same parts, in the same order.",
                rank=rank,
            )
        if offer.overwrite != first.overwrite:
            raise RankError(f"rank 0 and rank {rank} differ in overwrite=", rank=rank)
        for part, sample in first.samples.items():
            if offer.samples.get(part) != sample:
                raise RankError(
                    f"part {part!r} is not the same on rank 0 and rank {rank}. Of modules and optimizers all ranks "
                    "must have the same tensors with the same values, but for DTensors and buffers. Give a part that "
                    "is to differ as a plain dict, such as {'model': model.state_dict()}.",
                    rank=rank,
                )


def _assign_loose(offers: Sequence[Offer]) -> dict[str, dict[str, int]]:
    """The loose tensors that are the same on all ranks, each with the rank that stores it: the fewest bytes first."""
    load = [0] * len(offers)
    assigned: dict[str, dict[str, int]] = {}
    for part, tensors in offers[0].loose.items():
        for name, tensor in tensors.items():
            if all(_tensor(offer, part, name) == tensor for offer in offers):
                rank = load.index(min(load))
                load[rank] += tensor.nbytes
                assigned.setdefault(part, {})[name] = rank
    return assigned


def _tensor(offer: Offer, part: str, name: str) -> Loose | None:
    return offer.loose.get(part, {}).get(name)
