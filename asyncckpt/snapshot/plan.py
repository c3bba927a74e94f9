"""Tensors to places in the image of a part.

Tensors that are the same memory under the same view are stored once. Where views of one memory overlap, the one that
spans all the others is stored and the others become views of it; where none does, the bytes they span together are
stored as U8. Everything else is stored row-major under its own name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from asyncckpt.errors import UnsupportedStateError
from asyncckpt.format.image import Image, Spec, layout
from asyncckpt.format.tree import TAG, show
from asyncckpt.snapshot import dtypes
from asyncckpt.snapshot.flatten import Leaf
from asyncckpt.snapshot.sharded import Shard

_ALIGN = 16
"""What bytes that hold items of unknown width are aligned to, where their size is a multiple of it."""


@dataclass(slots=True)
class Source:
    """What is copied to one entry. `data` shares the memory of `live`, the tensors of the state that it stands for.

    `contiguous` says whether its bytes are the entry's bytes as they lie, but for the `cast`: the dtype of the entry,
    where it is another than that of `data`. Of a DTensor, `shard` is where the entry lies in what the tree names.
    """

    data: torch.Tensor
    live: list[torch.Tensor]
    contiguous: bool
    cast: torch.dtype | None = None
    shard: Shard | None = None


@dataclass(slots=True)
class PartPlan:
    """Where the tensors of one part go; `sources` match `image.entries`."""

    specs: list[Spec]
    sources: list[Source]
    image: Image


def plan_part(leaves: Sequence[Leaf], last: PartPlan | None) -> PartPlan:
    """Give each leaf its place and complete its node. The image of `last` is taken over where it fits.

    Raises:
        UnsupportedStateError: more tensors than a safetensors header can name.
    """
    builder = _Builder()
    for group in _groups(leaves):
        builder.add(group)
    builder.restore_order()
    return _laid_out(builder, leaves, last)


def plan_export(leaves: Sequence[Leaf], to: torch.dtype, last: PartPlan | None) -> PartPlan:
    """The same for an export, in which floating tensors are cast `to` a dtype and complete their nodes anew.

    Exact aliases are stored once; other views that share memory are stored each on its own.

    Raises:
        UnsupportedStateError: more tensors than a safetensors header can name.
    """
    builder = _Builder(to)
    views: dict[tuple[Any, ...], list[Leaf]] = {}
    for i, leaf in enumerate(leaves):
        if leaf.node[TAG] == "tensor":
            leaf.node.clear()
            leaf.node[TAG] = "tensor"
        t = leaf.tensor
        here = (str(t.device), t.data_ptr()) if t.numel() else i
        views.setdefault((here, t.dtype, t.shape, t.stride(), leaf.node.get("d")), []).append(leaf)
    for first, same in enumerate(views.values()):
        builder.store(same, first)
    return _laid_out(builder, leaves, last)


def _laid_out(builder: _Builder, leaves: Sequence[Leaf], last: PartPlan | None) -> PartPlan:
    if last is not None and last.specs == builder.specs:
        return PartPlan(last.specs, builder.sources, last.image)
    try:
        image = layout(builder.specs)
    except ValueError as error:
        part = str(leaves[0].path[0])
        raise UnsupportedStateError(f"part {part!r} has too many tensors for one file: {error}", path=part) from error
    return PartPlan(builder.specs, builder.sources, image)


@dataclass(slots=True)
class _Group:
    """Leaves whose memory spans meet: bytes `start` to `end`, `first` counting in the order of the walk."""

    leaves: list[Leaf]
    start: int
    end: int
    first: int


def _groups(leaves: Sequence[Leaf]) -> list[_Group]:
    """Leaves whose memory spans overlap, together; in the order of the walk."""
    groups: list[_Group] = []
    spans = []
    for i, leaf in enumerate(leaves):
        start, size = leaf.tensor.data_ptr(), _span(leaf.tensor)
        if size == 0 or start == 0:
            groups.append(_Group([leaf], 0, 0, i))
        else:
            spans.append((str(leaf.tensor.device), start, start + size, i))
    spans.sort()
    current: _Group | None = None
    device = ""
    for dev, start, end, i in spans:
        if current is not None and dev == device and start < current.end:
            current.leaves.append(leaves[i])
            current.end, current.first = max(current.end, end), min(current.first, i)
        else:
            current, device = _Group([leaves[i]], start, end, i), dev
            groups.append(current)
    groups.sort(key=lambda g: g.first)
    return groups


def _span(tensor: torch.Tensor) -> int:
    """Bytes from the first to the last item."""
    if tensor.numel() == 0:
        return 0
    if tensor.is_contiguous():
        return tensor.numel() * tensor.dtype.itemsize
    items = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return items * tensor.dtype.itemsize


class _Builder:
    def __init__(self, to: torch.dtype | None = None) -> None:
        self._to = to
        self.specs: list[Spec] = []
        self.sources: list[Source] = []
        self._firsts: list[int] = []
        self._names: set[str] = {"__metadata__"}

    def restore_order(self) -> None:
        """Entries in the order of the walk."""
        order = sorted(range(len(self._firsts)), key=self._firsts.__getitem__)
        self.specs = [self.specs[i] for i in order]
        self.sources = [self.sources[i] for i in order]

    def add(self, group: _Group) -> None:
        views: dict[tuple[Any, ...], list[Leaf]] = {}
        for leaf in group.leaves:
            t = leaf.tensor
            views.setdefault((t.data_ptr(), t.dtype, t.shape, t.stride(), leaf.shard), []).append(leaf)
        distinct = list(views.values())
        if len(distinct) == 1 and not _overlaps_itself(distinct[0][0].tensor):
            self.store(distinct[0], group.first)
            return
        if not _overlap([same[0].tensor for same in distinct], group):
            for same in distinct:
                self.store(same, group.first)
            return
        for leaf in group.leaves:
            if leaf.shard is not None:
                raise UnsupportedStateError(
                    f"{show(leaf.path)} is a DTensor whose memory is partly that of another tensor; save one of them",
                    path=show(leaf.path),
                )
        self._store_shared(distinct, group)

    def store(self, same: list[Leaf], first: int) -> None:
        """A tensor row-major under its own name; `same` are the leaves that are this very view."""
        t = same[0].tensor
        name = self._name(same[0])
        cast = dtypes.exported(t.dtype, self._to) if self._to is not None else None
        code = dtypes.CODES.get(cast or t.dtype)
        array_leaf = "d" in same[0].node
        width = (cast or t.dtype).itemsize
        shape = tuple(t.shape) if code else (t.numel() * width,)
        contiguous, shard = t.is_contiguous(), same[0].shard
        whole = tuple(t.shape) if shard is None else shard.shape
        if shard is not None and code is None:
            shard = shard.in_bytes(width)
            shape = shard.size
        self._append(
            Spec(name, code or "U8", shape, math.gcd(_ALIGN, shape[0]) if array_leaf else width, _is_frozen(same)),
            Source(t.detach(), [leaf.tensor for leaf in same], contiguous, cast, shard),
            first,
        )
        extra: dict[str, Any] = {"n": name}
        if code is None:
            extra |= {"d": dtypes.name(t.dtype), "s": list(whole)}
        if shard is None and not contiguous and is_dense(t):
            extra |= {"s": list(t.shape), "st": list(t.stride())}
        for leaf in same:
            leaf.node.update(extra)

    def _store_shared(self, distinct: list[list[Leaf]], group: _Group) -> None:
        """Overlapping views: one entry for the bytes they span, and a view of it for each."""
        cover = next((same for same in distinct if _covers(same[0].tensor, group)), None)
        if cover is not None and all(_aligned(same[0].tensor, group.start) for same in distinct):
            self.store(cover, group.first)
            name, start = cover[0].node["n"], group.start
            distinct = [same for same in distinct if same is not cover]
            self.sources[-1].live += [leaf.tensor for same in distinct for leaf in same]
        else:
            storage = distinct[0][0].tensor.untyped_storage()
            start = group.start - (group.start - storage.data_ptr()) % _ALIGN
            span = torch.empty(0, dtype=torch.uint8, device=storage.device)
            span.set_(storage, start - storage.data_ptr(), (group.end - start,), (1,))
            name = self._name(distinct[0][0])
            live = [leaf.tensor for same in distinct for leaf in same]
            size = group.end - start
            self._append(Spec(name, "U8", (size,), math.gcd(_ALIGN, size)), Source(span, live, True), group.first)
        for same in distinct:
            t = same[0].tensor
            view = {"n": name, "d": dtypes.name(t.dtype), "s": list(t.shape), "st": list(t.stride())}
            for leaf in same:
                leaf.node.update(view, o=t.data_ptr() - start)

    def _append(self, spec: Spec, source: Source, first: int) -> None:
        self.specs.append(spec)
        self.sources.append(source)
        self._firsts.append(first)

    def _name(self, leaf: Leaf) -> str:
        """The path below the part, joined by dots; made unique, and never the header's own key."""
        base = ".".join(map(str, leaf.path[1:])) or str(leaf.path[0])
        base = base.encode("utf-8", "backslashreplace").decode()
        name, n = base, 2
        while name in self._names:
            name, n = f"{base}#{n}", n + 1
        self._names.add(name)
        return name


def _is_frozen(leaves: list[Leaf]) -> bool:
    """Whether it is a parameter that no optimizer is meant to change. A hint for the layout, nothing more."""
    return all(isinstance(leaf.tensor, torch.nn.Parameter) and not leaf.tensor.requires_grad for leaf in leaves)


def _covers(tensor: torch.Tensor, group: _Group) -> bool:
    size = tensor.numel() * tensor.dtype.itemsize
    return tensor.is_contiguous() and tensor.data_ptr() == group.start and size == group.end - group.start


def _aligned(tensor: torch.Tensor, start: int) -> bool:
    return (tensor.data_ptr() - start) % tensor.dtype.itemsize == 0


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    return not tensor.is_contiguous() and not is_dense(tensor) and _overlap([tensor], None)


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the items fill their span without gap or overlap, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((s, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _overlap(tensors: Iterable[torch.Tensor], group: _Group | None) -> bool:
    """Whether any byte belongs to two items, found by marking them all."""
    tensors = list(tensors)
    storages = {t.untyped_storage().data_ptr() for t in tensors}
    if group is not None and all(t.is_contiguous() for t in tensors):
        return len(storages) == 1  # their spans meet, and a span without gaps is its items
    if len(storages) > 1:
        return False  # two storages over one memory (from_numpy twice): stored apart, each with the right values
    start = group.start if group is not None else tensors[0].data_ptr()
    size = group.end - group.start if group is not None else _span(tensors[0])
    marks = np.zeros(size, np.bool_)
    for t in tensors:
        width = t.dtype.itemsize
        seen = np.lib.stride_tricks.as_strided(
            marks[t.data_ptr() - start :],
            shape=(*t.shape, width),
            strides=(*(s * width for s in t.stride()), 1),
        )
        before = int(marks.sum())
        if seen.any():
            return True
        seen[...] = True
        if int(marks.sum()) - before != t.numel() * width:
            return True
    return False
