"""What one rank stores of a save: the items of its plan as entries of the images of parts."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
from torch.distributed.checkpoint.metadata import TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from asyncckpt.errors import NotSupportedError, UnsupportedStateError
from asyncckpt.format.image import Spec
from asyncckpt.format.ranks import StoredShard
from asyncckpt.format.tree import TAG, Node, Path, show, unsupported
from asyncckpt.integrations.dcp import keys
from asyncckpt.snapshot import dtypes
from asyncckpt.snapshot.flatten import Flattener
from asyncckpt.snapshot.plan import plan_part
from asyncckpt.snapshot.sharded import Shard, local
from asyncckpt.write.streams import Source


@dataclass(frozen=True)
class Value:
    """What came of a value that is no tensor: its node, as JSON, and the tensors in it."""

    node: bytes
    tensors: tuple[str, ...]


@dataclass
class PartShare:
    """Of one part: entries of an image, where their bytes come from, and which boxes of which tensors they are."""

    specs: list[Spec] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    shards: dict[str, StoredShard] = field(default_factory=dict)

    def add(self, name: str, stored: StoredShard, align: int, source: Source) -> None:
        self.specs.append(Spec(name, stored.dtype, stored.size, align))
        self.sources.append(source)
        self.shards[name] = stored


def layers(plan: SavePlan) -> list[list[WriteItem]]:
    """The items, so that no key is twice in one list: an image has one entry of a name."""
    found: list[list[WriteItem]] = [[]]
    seen: dict[str, int] = {}
    for item in plan.items:
        depth = seen[item.index.fqn] = seen.get(item.index.fqn, -1) + 1
        if depth == len(found):
            found.append([])
        found[depth].append(item)
    return found


def paths(items: Iterable[str], planner_data: Any) -> dict[str, Path]:
    """By key, its path in the state."""
    known = planner_data if isinstance(planner_data, Mapping) else {}
    return {key: tuple(known.get(key, (key,))) for key in items}


def stored_as(item: WriteItem, path: Path) -> StoredShard:
    """What is stored of a tensor; of a dtype that safetensors lacks the bytes, along one more dimension.

    Raises:
        UnsupportedStateError: a tensor that is more than strided bytes.
    """
    data = item.tensor_data
    assert data is not None
    properties = data.properties
    if properties.layout != torch.strided or properties.dtype in dtypes.QUANTIZED:
        raise UnsupportedStateError(
            f"{show(path)} is a tensor of layout {properties.layout} and dtype {properties.dtype}, which can't be "
            "stored. Save the plain tensors it is made of.",
            path=show(path),
        )
    code = dtypes.CODES.get(properties.dtype)
    shard = Shard(tuple(data.size), tuple(data.chunk.offsets), tuple(data.chunk.sizes))
    if code is None:
        shard = shard.in_bytes(properties.dtype.itemsize)
    return StoredShard(code or "U8", shard.shape, shard.offset, shard.size)


def tensor_node(name: str, properties: TensorProperties, size: torch.Size) -> Node:
    node: dict[str, Any] = {TAG: "tensor", "n": name}
    if properties.dtype not in dtypes.CODES:
        node |= {"d": dtypes.name(properties.dtype), "s": list(size)}
    return node


def collect(
    items: list[WriteItem], plan: SavePlan, planner: SavePlanner, parts: Iterable[str], whole: str | None
) -> tuple[dict[str, PartShare], list[WriteResult]]:
    """What `items` are stored as, by part, and the results that DCP gathers.

    Raises:
        UnsupportedStateError: a value can't be stored exactly.
        NotSupportedError: the planner does not give values that are no tensors, but only pickles of them.
    """
    shares = {part: PartShare() for part in parts}
    where = paths((item.index.fqn for item in items), plan.planner_data)
    results = []
    for item in items:
        path = where[item.index.fqn]
        part, below = keys.placed(path, whole)
        if item.type == WriteItemType.BYTE_IO:
            value = _add_value(shares[part], _value_of(planner, item), part, below)
            results.append(WriteResult(item.index, len(value.node), value))
            continue
        assert item.tensor_data is not None
        stored = stored_as(item, path)
        if stored.nbytes or 0 in stored.shape:
            align = item.tensor_data.properties.dtype.itemsize
            shares[part].add(keys.entry_name(part, below), stored, align, _tensor_source(planner, item, path))
        results.append(WriteResult(item.index, stored.nbytes, None))
    return shares, results


def _value_of(planner: SavePlanner, item: WriteItem) -> Any:
    look_up = getattr(planner, "lookup_object", None)
    if look_up is None:
        raise NotSupportedError(
            f"{type(planner).__name__} has no lookup_object(index): of values that are no tensors it gives pickles, "
            "which are never stored here. Derive it from torch's DefaultSavePlanner."
        )
    return look_up(item.index)


class Values(Flattener):
    """What DCP would have pickled; an object with a state of its own would come back as a dict, so it is refused.

    Of an io.BytesIO the bytes are stored: states for DCP hold it for what else would be pickled twice.
    """

    def other(self, value: Any, path: Path) -> Node:
        if isinstance(value, io.BytesIO):
            return self.encode(value.getvalue(), path)
        if isinstance(value, torch.nn.Module) or hasattr(value, "load_state_dict"):
            raise unsupported(value, path)
        return super().other(value, path)


def _add_value(share: PartShare, value: Any, part: str, below: Path) -> Value:
    """Store the tensors in a value, and give its node."""
    flattener = Values()
    node = flattener.encode(value, (part, *below))
    for leaf in flattener.leaves:
        if leaf.shard is not None:
            raise UnsupportedStateError(
                f"{show(leaf.path)} is a DTensor in a value that DCP does not flatten", path=show(leaf.path)
            )
    plan = plan_part(flattener.leaves, None)
    for spec, source in zip(plan.specs, plan.sources, strict=True):
        stored = StoredShard(spec.dtype, spec.shape, (0,) * len(spec.shape), spec.shape)
        share.add(spec.name, stored, spec.align, _Bytes(source.data))
    return Value(msgspec.json.encode(node), tuple(spec.name for spec in plan.specs))


class _Bytes:
    """A source: the bytes of a tensor, on whatever device, row by row."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __call__(self) -> Iterator[memoryview]:
        yield bytes_of(self._tensor)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor row by row: its own memory, if that has this order."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    plain = dtypes.as_plain(plain).contiguous().cpu()
    return plain.reshape(-1).view(torch.uint8).numpy().data


def _tensor_source(planner: SavePlanner, item: WriteItem, path: Path) -> Source:
    assert item.tensor_data is not None
    properties, sizes = item.tensor_data.properties, tuple(item.tensor_data.chunk.sizes)

    def read() -> Iterator[memoryview]:
        resolved = planner.resolve_data(item)
        assert isinstance(resolved, torch.Tensor)
        tensor = local(resolved.detach())
        if tuple(tensor.shape) != sizes or tensor.dtype != properties.dtype:
            raise UnsupportedStateError(
                f"{show(path)} is a tensor {tuple(tensor.shape)} of {tensor.dtype}, and was planned as {sizes} of "
                f"{properties.dtype}",
                path=show(path),
            )
        if tensor.is_meta or (tensor.numel() and not tensor.data_ptr()):
            raise UnsupportedStateError(
                f"{show(path)} is a tensor without memory; materialize it first", path=show(path)
            )
        yield bytes_of(tensor)

    return read
