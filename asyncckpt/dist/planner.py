"""Which rank stores which tensor: decided by the planner of torch.distributed.checkpoint.

It finds the shards that several ranks have, and gives each to the rank with the fewest bytes so far; it also checks
that the shards of every tensor are that tensor.
"""

from __future__ import annotations

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from asyncckpt.dist.offers import Item
from asyncckpt.errors import RankError
from asyncckpt.snapshot import dtypes

_Place = tuple[str, str, tuple[int, ...]]


def assign(items: list[list[Item]]) -> list[list[int]]:
    """By rank, the numbers of those of its items that it stores.

    Raises:
        RankError: the shards of a tensor leave holes or overlap, or ranks have different tensors of one name.
    """
    _check_same(items)
    taken = _lowest(items)
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner({}, is_coordinator=True)
    plans = [
        SavePlan([_write_item(item) for item in mine if not item.lowest or taken[_place(item)] == rank])
        for rank, mine in enumerate(items)
    ]
    try:
        chosen, _ = planner.create_global_plan(plans)
    except (ValueError, AssertionError) as error:
        raise _different(str(error)) from error
    stored = [{(i.index.fqn, tuple(i.index.offset or ())) for i in plan.items} for plan in chosen]
    return [
        [number for number, item in enumerate(mine) if (_fqn(item), item.offset) in stored[rank]]
        for rank, mine in enumerate(items)
    ]


def _check_same(items: list[list[Item]]) -> None:
    """What bears one name must be of one tensor, and what begins at one place one shard: the planner does not look."""
    seen: dict[tuple[str, ...] | _Place, object] = {}
    for rank, mine in enumerate(items):
        for item in mine:
            tensor, shard = (item.dtype, item.shape), item.size
            if seen.setdefault(_place(item)[:2], tensor) != tensor or seen.setdefault(_place(item), shard) != shard:
                raise _different(f"rank {rank} has another tensor {item.name!r} of part {item.part!r} than a lower rank")


def _different(why: str) -> RankError:
    return RankError(
        f"the ranks do not have the same tensors under the same names: {why}. What differs by rank must be a DTensor, or "
        "be given as a plain dict, such as {'model': model.state_dict()}."
    )


def _place(item: Item) -> _Place:
    return item.part, item.name, item.offset


def _fqn(item: Item) -> str:
    return f"{item.part}/{item.name}"


def _lowest(items: list[list[Item]]) -> dict[_Place, int]:
    """The lowest rank that has each item."""
    found: dict[_Place, int] = {}
    for rank, mine in enumerate(items):
        for item in mine:
            found.setdefault(_place(item), rank)
    return found


def _write_item(item: Item) -> WriteItem:
    offset, size = torch.Size(item.offset), torch.Size(item.size)
    data = TensorWriteData(
        chunk=ChunkStorageMetadata(offset, size),
        properties=TensorProperties(dtype=dtypes.BY_CODE[item.dtype]),
        size=torch.Size(item.shape),
    )
    return WriteItem(MetadataIndex(_fqn(item), offset), WriteItemType.SHARD, tensor_data=data)
