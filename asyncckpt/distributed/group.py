"""Which ranks there are, and the store that they share."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from asyncckpt.errors import CheckpointError

_instances = itertools.count(1)


def ranks_of_this_job() -> int:
    """How many ranks torch's default process group has; 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@dataclass(frozen=True)
class Group:
    """`rank` of `world`. All ranks make their groups in the same order."""

    rank: int
    world: int
    store: Any
    prefix: str

    @classmethod
    def default(cls) -> Group | None:
        """Of torch's default process group; None where there is none, or it is of one rank.

        Raises:
            CheckpointError: its ranks share no store.
        """
        if ranks_of_this_job() == 1:
            return None
        try:
            store = dist.distributed_c10d._get_default_store()
        except Exception as error:
            raise CheckpointError(
                f"the ranks of the default process group share no store ({error}); initialize it by a store or an "
                "init_method, such as env://, which torchrun prepares"
            ) from error
        return cls(dist.get_rank(), dist.get_world_size(), store, f"asyncckpt/{next(_instances)}")

    @property
    def others(self) -> list[int]:
        return [rank for rank in range(self.world) if rank != self.rank]

    def connection(self) -> Any:
        """The store, by a connection of its own where the store can give one: a wait in one blocks no other."""
        clone = getattr(self.store, "clone", None)
        return dist.distributed_c10d.PrefixStore(self.prefix, self.store if clone is None else clone())
