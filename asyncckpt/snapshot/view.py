"""A checkpoint as one process, or one rank of several, restores it: what it may see, and in which layout.

Where the live state has a DTensor, only this rank's shard of it is read, whatever the layout it was saved in; the
state of an optimizer takes the layout of its parameter. Everywhere else tensors are read whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from asyncckpt.errors import StateMismatchError
from asyncckpt.format.ranks import Box
from asyncckpt.format.tree import TAG
from asyncckpt.read.assemble import assemble, whole_entries
from asyncckpt.read.reader import CheckpointReader, PartImage
from asyncckpt.snapshot import dtypes
from asyncckpt.snapshot.apply import Rename, new_name
from asyncckpt.snapshot.flatten import is_stateful, unwrapped
from asyncckpt.snapshot.rebuild import Rebuilder, rebuild_part
from asyncckpt.snapshot.sharded import is_dtensor, local, shard_of, there_are_dtensors


class View:
    """`state` is what is restored; `rank` of `world` restores it."""

    def __init__(self, state: Mapping[str, Any], rank: int = 0, world: int = 1, rename: Rename | None = None) -> None:
        self.rank, self._world = rank, world
        self._state, self._rename = state, rename

    def visible(self, reader: CheckpointReader, parts: list[str]) -> list[str]:
        """Those of `parts` that this rank can restore: what each rank had of its own is for the rank of that number.

        Raises:
            StateMismatchError: a module or an optimizer that was another one on each rank, and there were more or
                fewer ranks.
        """
        saved = reader.manifest.world
        own = [part for part in parts if not reader.is_common(part)]
        if not own or saved == self._world:
            return parts
        for part in own:
            if isinstance(self._state[part], torch.nn.Module | Optimizer):
                raise StateMismatchError(
                    f"part {part!r} of step {reader.step} was another one on each of {saved} ranks, so that {saved} "
                    f"ranks can restore it, and not {self._world}. Use parts= for the others."
                )
        there = self.rank < saved
        warnings.warn(
            f"step {reader.step} was saved by {saved} ranks, and is restored by {self._world}: {', '.join(own)} "
            f"differed between them, and rank {self.rank} {'takes that of its number' if there else 'keeps its own'}",
            stacklevel=2,
        )
        return parts if there else [part for part in parts if part not in own]

    def rebuild(self, reader: CheckpointReader, part: str) -> Any:
        """The value of `part`, in the layout of the live one.

        Raises:
            CorruptCheckpointError: some byte that is needed is not what was committed.
        """
        if not there_are_dtensors():
            return rebuild_part(reader, part)
        tree = reader.tree(part)
        found: dict[str, tuple[Any, dict[str, Any]]] = {}
        _find(self._state[part], tree, self._rename, found)
        if not found:
            return rebuild_part(reader, part)
        whole = whole_entries(reader, part)
        wants: dict[str, Box | None] = dict.fromkeys(_named(tree))
        layouts: dict[str, tuple[Any, torch.Size]] = {}
        for name, (tensor, node) in found.items():
            shard = shard_of(tensor, (part, name))
            width = (dtypes.BY_NAME[str(node["d"])].itemsize,) if "d" in node else ()
            if name in whole and whole[name].shape == (*shard.shape, *width):
                wants[name] = ((*shard.offset, *(0 for _ in width)), (*shard.size, *width))
                layouts[name] = (tensor, torch.Size(shard.size))
        return _ShardRebuilder(assemble(reader, part, wants), layouts).decode(tree)


def _find(live: Any, node: Any, rename: Rename | None, found: dict[str, tuple[Any, dict[str, Any]]]) -> None:
    """The DTensors of `live` whose bytes `node` names, by the names of their entries."""
    if isinstance(live, Optimizer):
        _find_in_optimizer(live, node, found)
        return
    if isinstance(live, torch.nn.Module):
        live = unwrapped(live).state_dict(keep_vars=True)
    elif is_stateful(live):
        live, rename = live.state_dict(), None
    if is_dtensor(live):
        if isinstance(node, dict) and node.get(TAG) == "tensor" and "o" not in node and "st" not in node:
            found.setdefault(str(node["n"]), (live, node))
    elif isinstance(live, Mapping):
        for key, item in _pairs(node):
            name = new_name(key, rename) if isinstance(key, str) and rename is not None else key
            if isinstance(name, str | int) and name in live:
                _find(live[name], item, None, found)
    elif isinstance(live, list | tuple):
        items = node.get("v") if isinstance(node, dict) else node
        if isinstance(items, list):
            for value, item in zip(live, items, strict=False):
                _find(value, item, None, found)


def _find_in_optimizer(live: Optimizer, node: Any, found: dict[str, tuple[Any, dict[str, Any]]]) -> None:
    """What of an optimizer's state has the shape of a DTensor that it is of, has its layout."""
    params = [p for group in live.param_groups for p in group["params"]]
    saved = dict(_pairs(node))
    for index, state in _pairs(saved.get("state")):
        if not isinstance(index, int) or not 0 <= index < len(params) or not is_dtensor(params[index]):
            continue
        for _, item in _pairs(state):
            if isinstance(item, dict) and item.get(TAG) == "tensor" and "o" not in item and "st" not in item:
                found.setdefault(str(item["n"]), (params[index], item))


def _pairs(node: Any) -> list[tuple[Any, Any]]:
    """The items of a node that is a dict of whatever kind; none, where it is something else."""
    if not isinstance(node, dict):
        return []
    kind = node.get(TAG)
    if kind is None:
        return list(node.items())
    items = node.get("v")
    if kind == "module":
        return _pairs(items)
    if kind in ("dict", "odict", "defaultdict", "counter") and isinstance(items, list):
        return [(pair[0], pair[1]) for pair in items if isinstance(pair, list) and len(pair) == 2]
    return []


def _named(node: Any) -> dict[str, None]:
    """The entries that a tree names, in order."""
    found: dict[str, None] = {}
    pending = [node]
    while pending:
        item = pending.pop()
        if isinstance(item, list):
            pending += item
        elif isinstance(item, dict):
            if item.get(TAG) in ("tensor", "ndarray"):
                found[str(item.get("n"))] = None
            else:
                pending += item.values()
    return found


class _ShardRebuilder(Rebuilder):
    """Makes DTensors of those entries of which the image holds one rank's box, in the layouts of live ones."""

    def __init__(self, image: PartImage, layouts: Mapping[str, tuple[Any, torch.Size]]) -> None:
        super().__init__(image)
        self._layouts = layouts

    def _tensor(self, node: dict[str, Any]) -> torch.Tensor:
        layout = self._layouts.get(str(node["n"]))
        if layout is None:
            return super()._tensor(node)
        from torch.distributed.tensor import DTensor

        like, size = layout
        node = {key: item for key, item in node.items() if key != "s"}
        part = super()._tensor({**node, "s": list(size)} if "d" in node else node)
        made: torch.Tensor = DTensor.from_local(
            part.to(local(like).device),
            like.device_mesh,
            like.placements,
            run_check=False,
            shape=like.shape,
            stride=like.stride(),
        )
        return made
