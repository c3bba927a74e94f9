"""What a rank brings into a save, and what of it the rank is to snapshot.

Of modules and optimizers, DTensors are spread over the ranks, and all other tensors are alike on all of them: each is
stored by one rank (of a module's buffers it is the lowest rank's that counts, as for DistributedDataParallel). Of every
other part, a tensor is a rank's own unless its bytes are the same on all ranks. What is no tensor is a rank's own where
the leaf trees differ.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import msgspec
import torch
from torch.optim import Optimizer

from asyncckpt.distributed.offers import Item, Loose, Offer, Verdict
from asyncckpt.format.image import layout
from asyncckpt.format.manifest import digest
from asyncckpt.format.ranks import StoredShard
from asyncckpt.snapshot import dtypes
from asyncckpt.snapshot.describe import Description, Part, placed
from asyncckpt.snapshot.plan import PartPlan, Source

_SAMPLES = 64
"""Tensors of a part whose items are compared between ranks."""


class Sharer:
    """Remembers of the last save what need not be made or told again."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._known_plan = self._version = ""
        self._owned: list[int] = []
        self._shares: weakref.WeakKeyDictionary[Part, tuple[frozenset[int], Part]] = weakref.WeakKeyDictionary()
        self._items: weakref.WeakKeyDictionary[Part, list[tuple[int, Item]]] = weakref.WeakKeyDictionary()

    def offer(
        self, what: Description, state: Mapping[str, Any], overwrite: bool, room: bool
    ) -> tuple[Offer, list[Item]]:
        """What this rank has, and the items among it."""
        items: list[Item] = []
        samples, loose = {}, {}
        for name, part in what.parts.items():
            known, value = self._items.get(part), state[what.exports.get(name, name)]
            if known is None:
                known = self._items[part] = _items(name, part.plan, value)
            items += [item for _, item in known]
            if _alike(value):
                samples[name] = _sample(part.plan, [i for i, item in known if not item.lowest])
            else:
                found = {part.plan.specs[i].name: _loose(source) for i, source in _loose_sources(part.plan)}
                if found:
                    loose[name] = found
        plan = digest(msgspec.msgpack.encode(items))
        offer = Offer(
            room=room,
            plan=plan,
            version=self._version,
            items=None if plan == self._known_plan else items,
            parts=list(what.parts),
            omitted=what.omitted,
            overwrite=overwrite,
            trees={name: digest(part.tree) for name, part in what.parts.items()},
            samples=samples,
            loose=loose,
        )
        return offer, items

    def share(self, what: Description, items: list[Item], offer: Offer, verdict: Verdict) -> Description:
        """What of it this rank is to snapshot."""
        if verdict.owned is not None:
            self._known_plan, self._version = offer.plan, verdict.version
            self._owned = verdict.owned[self._rank]
        owned = {(items[i].part, items[i].name): items[i] for i in self._owned}
        parts, shards = {}, {}
        for name, part in what.parts.items():
            assigned = verdict.assigned.get(name, {})
            mine: dict[str, StoredShard] = {}
            kept = []
            own = {spec.name for spec in part.plan.specs} & offer.loose.get(name, {}).keys() - assigned.keys()
            for i, spec in enumerate(part.plan.specs):
                item = owned.get((name, spec.name))
                if item is not None:
                    mine[spec.name] = StoredShard(item.dtype, item.shape, item.offset, item.size)
                elif assigned.get(spec.name) == self._rank:
                    mine[spec.name] = StoredShard(spec.dtype, spec.shape, (0,) * len(spec.shape), spec.shape)
                elif spec.name not in own:
                    continue
                kept.append(i)
            parts[name] = self._cut(part, frozenset(kept))
            shards[name] = mine
        told = {n: msgspec.Raw(p.tree) for n, p in what.parts.items() if self._rank == 0 or n not in verdict.same}
        trees, shares = msgspec.json.encode(told), msgspec.json.encode(shards)
        return placed(parts, trees + shares, what.optimizers, what.omitted, what.exports, len(shares))

    def _cut(self, part: Part, kept: frozenset[int]) -> Part:
        """The part with only these entries; the same one as long as these are."""
        known = self._shares.get(part)
        if known is not None and known[0] == kept:
            return known[1]
        indices = sorted(kept)
        specs = [part.plan.specs[i] for i in indices]
        cut = Part(PartPlan(specs, [part.plan.sources[i] for i in indices], layout(specs)), b"")
        self._shares[part] = (kept, cut)
        return cut


def _alike(value: Any) -> bool:
    """Whether the plain tensors of this part are taken to be the same on all ranks."""
    return isinstance(value, torch.nn.Module | Optimizer)


def _items(name: str, plan: PartPlan, value: Any) -> list[tuple[int, Item]]:
    """The tensors of a part that ranks share, with their numbers in its plan."""
    found = []
    module = isinstance(value, torch.nn.Module)
    for i, (spec, source) in enumerate(zip(plan.specs, plan.sources, strict=True)):
        shard = source.shard
        if shard is not None:
            if not shard.empty:
                box = (shard.shape, shard.offset, spec.shape)
                found.append((i, Item(name, spec.name, spec.dtype, *box, lowest=False)))
        elif _alike(value):
            box = (spec.shape, (0,) * len(spec.shape), spec.shape)
            buffer = module and not any(isinstance(t, torch.nn.Parameter) for t in source.live)
            found.append((i, Item(name, spec.name, spec.dtype, *box, lowest=buffer)))
    return found


def _loose_sources(plan: PartPlan) -> list[tuple[int, Source]]:
    return [(i, source) for i, source in enumerate(plan.sources) if source.shard is None]


def _loose(source: Source) -> Loose:
    data = _bytes(source.data)
    about = f"{source.data.dtype}{tuple(source.data.shape)}"
    return Loose(digest(about.encode() + digest(data).encode()), data.nbytes)


def _bytes(tensor: torch.Tensor) -> memoryview:
    plain = dtypes.as_plain(tensor.detach()).contiguous().cpu()
    return plain.view(-1).view(torch.uint8).numpy().data


def _sample(plan: PartPlan, which: list[int]) -> str:
    """A digest of a few items of some of the tensors that all ranks must have alike."""
    plain = [i for i in which if plan.sources[i].shard is None and plan.sources[i].data.numel()]
    picked = plain[:: max(1, -(-len(plain) // _SAMPLES))]
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for i in picked:
        flat = dtypes.as_plain(plan.sources[i].data).reshape(-1)
        some = flat[:: max(1, flat.numel() // 3)][:4].contiguous().view(torch.uint8)
        by_device.setdefault(some.device, []).append(some)
    return digest(b"".join(bytes(torch.cat(some).cpu().numpy()) for some in by_device.values()))
