"""Which rank stores which tensor.

A shard that several ranks have is stored by the one with the fewest bytes so far. It is the rule of
torch.distributed.checkpoint's planner, which is not asked, since it compares every shard of a tensor with every other:
for a million shards that takes minutes (`benchmarks/scale.py`).
"""

from __future__ import annotations

import math

from asyncckpt.distributed.offers import Item
from asyncckpt.errors import RankError
from asyncckpt.format.image import ITEM_SIZE
from asyncckpt.format.ranks import is_whole

_Place = tuple[str, str, tuple[int, ...]]


def assign(items: list[list[Item]]) -> list[list[int]]:
    """By rank, the numbers of those of its items that it stores.

    Raises:
        RankError: the shards of a tensor leave holes or overlap, or ranks have different tensors of one name.
    """
    holders = _holders(items)
    load = [0] * len(items)
    owned: list[list[int]] = [[] for _ in items]
    for having in sorted(holders.values(), key=len):  # what only one rank has is its load before anything is spread
        rank, number = having[0]
        item = items[rank][number]
        if len(having) > 1 and not item.lowest:
            rank, number = min(having, key=lambda at: load[at[0]])
        load[rank] += math.prod(item.size) * ITEM_SIZE[item.dtype]
        owned[rank].append(number)
    return [sorted(mine) for mine in owned]


def _holders(items: list[list[Item]]) -> dict[_Place, list[tuple[int, int]]]:
    """By shard, the ranks that have it, each with its number there, lowest first.

    Raises:
        RankError: shards are not alike where they must be, or do not make up their tensor.
    """
    holders: dict[_Place, list[tuple[int, int]]] = {}
    tensors: dict[tuple[str, str], list[Item]] = {}
    for rank, mine in enumerate(items):
        for number, item in enumerate(mine):
            having = holders.setdefault((item.part, item.name, item.offset), [])
            shards = tensors.setdefault((item.part, item.name), [])
            first = items[having[0][0]][having[0][1]] if having else None
            other = shards[0] if shards else item
            if (item.dtype, item.shape) != (other.dtype, other.shape) or (first and item.size != first.size):
                raise _different(
                    f"rank {rank} has another tensor {item.name!r} of part {item.part!r} than a lower rank"
                )
            having.append((rank, number))
            if first is None:
                shards.append(item)
    for (part, name), shards in tensors.items():
        if not is_whole(shards[0].shape, shards):
            raise _different(f"the shards of tensor {name!r} of part {part!r} leave holes or overlap")
    return holders


def _different(why: str) -> RankError:
    return RankError(
        f"the ranks do not have the same tensors under the same names: {why}. What differs by rank must be a DTensor, "
        "or be given as a plain dict, such as {'model': model.state_dict()}."
    )
