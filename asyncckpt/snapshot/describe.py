"""What a snapshot will be: state -> parts, each with its plan and leaf tree, and their places in an arena.

A part whose guard says that nothing of its structure has changed is not walked again.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec
import torch
from torch.optim import Optimizer

from asyncckpt.errors import UnsupportedStateError
from asyncckpt.format import names
from asyncckpt.snapshot import dtypes
from asyncckpt.snapshot.arena import PAGE
from asyncckpt.snapshot.flatten import Flattener
from asyncckpt.snapshot.guards import Guard, ModuleGuard, OptimizerGuard
from asyncckpt.snapshot.plan import PartPlan, plan_export, plan_part

_Place = tuple[int, torch.dtype, torch.Size, tuple[int, ...]]


@dataclass(eq=False)
class Part:
    """What is known of one part from its last save."""

    plan: PartPlan
    tree: bytes
    value: weakref.ref[Any] | None = None
    guard: Guard | None = None
    frame: tuple[msgspec.Raw, list[msgspec.Raw]] | None = None
    """Of an optimizer: its `state` and each group's `params`, as JSON."""
    live: list[torch.Tensor] = field(default_factory=list)
    shape: list[_Place] = field(default_factory=list)
    export: Part | None = None
    """The same once more, cast, where that is wanted."""

    def still(self, value: Any) -> bool:
        """Whether `value` is the same object with the same tensors at the same places."""
        return (
            self.guard is not None
            and self.value is not None
            and self.value() is value
            and self.guard.holds(value)
            and all(_place(t) == place for t, place in zip(self.live, self.shape, strict=True))
        )


@dataclass(frozen=True)
class Description:
    """What one snapshot will be. `spans` are (part, offset, size) in the arena; sizes in bytes.

    `omitted` are the parts of the state that it will not have, `exports` those of `parts` that are casts of others, and
    the names of these; `optimizers` are those of the whole state, for what
    they own is theirs whether they are saved or not. Of one of several ranks, the last `shares` bytes of `trees` say
    what it has of which tensor (see `write.messages.Seal`).
    """

    parts: dict[str, Part]
    spans: list[tuple[str, int, int]]
    trees: bytes
    trees_offset: int
    size: int
    optimizers: list[Optimizer]
    omitted: list[str]
    exports: dict[str, str]
    shares: int = 0


class Describer:
    """Walks states, and remembers of each part what saves the next walk.

    Of a part that `exports` names, there is one more whose floating tensors are cast to that dtype; "model" and "bf16"
    give "model-bf16".
    """

    def __init__(self, exports: Mapping[str, str]) -> None:
        self._parts: dict[str, Part] = {}
        self._exports = exports

    def forget(self) -> None:
        """Let go of the state."""
        self._parts.clear()

    def describe(self, state: Mapping[str, Any], chosen: Collection[str] | None) -> Description:
        """Walk the `chosen` parts of `state`, or all.

        Raises:
            UnsupportedStateError: something in it can't be stored exactly, or a part's name can't be a file's.
        """
        _check_names(state, self._exports)
        picked = {name: state[name] for name in (state if chosen is None else chosen)}
        parts = {name: self._describe_part(name, value) for name, value in picked.items()}
        self._parts.update(parts)
        exports = {names.export_part(name, dtype): name for name, dtype in self._exports.items() if name in parts}
        parts |= {export: part for export, name in exports.items() if (part := parts[name].export) is not None}
        trees = msgspec.json.encode({name: msgspec.Raw(part.tree) for name, part in parts.items()})
        optimizers = [value for value in state.values() if isinstance(value, Optimizer)]
        return placed(parts, trees, optimizers, [name for name in state if name not in picked], exports)

    def _describe_part(self, name: str, value: Any) -> Part:
        known = self._parts.get(name)
        if known is not None and known.still(value):
            tree = self._optimizer_tree(name, value, known) if isinstance(value, Optimizer) else known.tree
            if tree is not None:
                known.tree = tree
                return known
        flattener = Flattener()
        node = flattener.encode(value, (name,))
        part = Part(plan_part(flattener.leaves, known.plan if known else None), b"")
        part.tree = msgspec.json.encode(node)
        if name in self._exports:
            last = known.export if known else None
            plan = plan_export(flattener.leaves, dtypes.EXPORTS[self._exports[name]], last.plan if last else None)
            part.export = Part(plan, msgspec.json.encode(node))
        if not any(leaf.made for leaf in flattener.leaves):
            self._guard(name, value, node, part, [leaf.tensor for leaf in flattener.leaves])
        return part

    def _guard(self, name: str, value: Any, node: Any, part: Part, live: list[torch.Tensor]) -> None:
        """Remember what lets the next save skip the walk, where the value is one whose structure can be guarded."""
        if isinstance(value, torch.nn.Module) and ModuleGuard.fits(value):
            part.guard = ModuleGuard(value)
        elif isinstance(value, Optimizer) and OptimizerGuard.fits(value):
            part.guard = OptimizerGuard(value)
            groups = [msgspec.Raw(msgspec.json.encode(group["params"])) for group in node["param_groups"]]
            part.frame = (msgspec.Raw(msgspec.json.encode(node["state"])), groups)
        else:
            return
        part.live = live
        part.shape = [_place(t) for t in live]
        part.value = weakref.ref(value, partial(_forget, weakref.ref(self), name))

    def _optimizer_tree(self, name: str, optimizer: Optimizer, part: Part) -> bytes | None:
        """The tree of an optimizer whose tensors stand where they stood, with its hyperparameters as they are now.

        None where there are tensors among the hyperparameters: those are found by a walk only.
        """
        assert part.frame is not None
        state, params = part.frame
        flattener = Flattener()
        groups = [
            {
                key: raw if key == "params" else flattener.encode(item, (name, "param_groups", i, key))
                for key, item in (*((k, v) for k, v in group.items() if k != "params"), ("params", None))
            }
            for i, (group, raw) in enumerate(zip(optimizer.param_groups, params, strict=True))
        ]
        return None if flattener.leaves else msgspec.json.encode({"state": state, "param_groups": groups})


def placed(
    parts: dict[str, Part],
    trees: bytes,
    optimizers: list[Optimizer],
    omitted: list[str],
    exports: dict[str, str],
    shares: int = 0,
) -> Description:
    """Give each part its place in an arena, one after the other, the trees behind them."""
    spans, position = [], 0
    for name, part in parts.items():
        size = part.plan.image.size if part.plan.specs else 0
        spans.append((name, position, size))
        position += -(-size // PAGE) * PAGE
    size = position + len(trees) + len(trees) // 4 + PAGE
    return Description(parts, spans, trees, position, size, optimizers, omitted, exports, shares)


def _place(tensor: torch.Tensor) -> _Place:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _check_names(state: Mapping[str, Any], exports: Mapping[str, str]) -> None:
    if not isinstance(state, Mapping) or not state:
        raise UnsupportedStateError(
            "the state must be a dict of named parts, such as {'model': model, 'optimizer': optimizer}",
            path="the state",
        )
    folded: set[str] = set()
    for name in state:
        if not isinstance(name, str) or not names.is_part(name):
            raise UnsupportedStateError(
                f"{name!r} can't be the name of a part: it becomes a file name, {names.PART_RULE}", path=str(name)
            )
        if name.lower() in folded:
            raise UnsupportedStateError(f"two parts are named {name!r} but for upper and lower case", path=name)
        folded.add(name.lower())
    for name, dtype in exports.items():
        if name not in state:
            raise UnsupportedStateError(f"export= names {name!r}, which the state does not have", path=name)
        if isinstance(state[name], Optimizer):
            raise UnsupportedStateError(f"export= names {name!r}, an optimizer: export what it optimizes", path=name)
        if names.export_part(name, dtype).lower() in folded:
            raise UnsupportedStateError(
                f"the state has a part {names.export_part(name, dtype)!r}, as the export of {name!r} is to be called",
                path=name,
            )


def _forget(owner: weakref.ref[Describer], name: str, value: object) -> None:
    """The object behind a part is gone: do not keep its tensors."""
    describer = owner()
    if describer is not None:
        describer._parts.pop(name, None)
