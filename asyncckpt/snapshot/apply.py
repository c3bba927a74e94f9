"""Restored values into live objects, in place.

`fit` compares first and raises before anything is touched; `apply` then changes the live objects. Modules and
anything with `load_state_dict` load; tensors and arrays in containers are written in place; plain values replace
those in dicts and lists.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, MutableSequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from asyncckpt.errors import StateMismatchError
from asyncckpt.format.tree import Path, show
from asyncckpt.snapshot import dtypes
from asyncckpt.snapshot.flatten import is_stateful, unwrapped
from asyncckpt.snapshot.rng import RngState, unfit
from asyncckpt.snapshot.sharded import local

Rename = Callable[[str], str] | Mapping[str, str]


class Mismatch:
    """What does not fit, collected over the whole state."""

    def __init__(self) -> None:
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self.misshaped: list[str] = []

    def check(self, strict: bool) -> None:
        """Raise unless everything fits, or, when not strict, unless only keys are missing or unexpected.

        Raises:
            StateMismatchError: names every key.
        """
        if not (self.misshaped or (strict and (self.missing or self.unexpected))):
            return
        lines = [
            f"{what}: {', '.join(keys[:20])}{f' and {len(keys) - 20} more' if len(keys) > 20 else ''}"
            for what, keys in (
                ("missing from the checkpoint", self.missing),
                ("unexpected in the checkpoint", self.unexpected),
                ("of another shape", self.misshaped),
            )
            if keys
        ]
        raise StateMismatchError(
            f"the checkpoint does not fit the live state; nothing was changed. {'; '.join(lines)}. "
            "Use rename= for other names, parts= for a part of it, strict=False to skip missing and unexpected keys.",
            missing=tuple(self.missing),
            unexpected=tuple(self.unexpected),
            misshaped=tuple(self.misshaped),
        )


def rename_keys(live: Any, saved: Any, rename: Rename | None) -> Any:
    """`saved` with its top-level text keys renamed: by a function, or by a mapping of prefixes, each tried in turn.

    What optimizers, schedulers and the like save has no names of layers, and stays as it is.

    Raises:
        StateMismatchError: two keys would have one name.
    """
    has_names = isinstance(live, torch.nn.Module) or not is_stateful(live)
    if rename is None or not isinstance(saved, dict) or not has_names:
        return saved
    renamed: Any = saved.copy()  # of the same kind: an ordered dict, a counter, a defaultdict
    renamed.clear()
    renamed.update({new_name(key, rename) if isinstance(key, str) else key: item for key, item in saved.items()})
    if len(renamed) < len(saved):
        names = Counter(new_name(key, rename) for key in saved if isinstance(key, str))
        twice = [name for name, count in names.items() if count > 1]
        raise StateMismatchError(f"rename= gives several keys of the checkpoint one name: {', '.join(twice)}")
    if hasattr(saved, "_metadata"):
        renamed._metadata = type(saved._metadata)(
            (new_name(key + ".", rename).removesuffix(".") if key else key, item)
            for key, item in saved._metadata.items()
        )
    return renamed


def new_name(key: str, rename: Rename) -> str:
    """What `rename` makes of one key."""
    if not isinstance(rename, Mapping):
        return rename(key)
    for prefix, other in rename.items():
        if key.startswith(prefix):
            key = other + key[len(prefix) :]
    return key


def fit(live: Any, saved: Any, path: Path, found: Mismatch) -> None:
    """Compare a live value with a saved one, and note what differs in `found`. Changes nothing."""
    if isinstance(live, torch.nn.Module):
        _fit_module(unwrapped(live), saved, path, found)
    elif isinstance(live, Optimizer):
        _fit_optimizer(live, saved, path, found)
    elif isinstance(live, RngState):
        if (why := unfit(saved)) is not None:
            found.misshaped.append(f"{show(path)} ({why})")
    elif is_stateful(live):
        pass  # its own load_state_dict judges
    elif isinstance(live, torch.Tensor | np.ndarray):
        if not isinstance(saved, torch.Tensor | np.ndarray) or tuple(live.shape) != tuple(saved.shape):
            found.misshaped.append(f"{show(path)} ({_form(saved)} in the checkpoint, {_form(live)} here)")
        elif not _converts(live, saved):
            found.misshaped.append(f"{show(path)} ({saved.dtype} in the checkpoint, {live.dtype} here)")
    elif isinstance(live, Mapping):
        _fit_keys(live, saved, path, found)
    elif isinstance(live, list | tuple) and _holds_state(live):
        if not isinstance(saved, list | tuple) or len(saved) != len(live):
            found.misshaped.append(f"{show(path)} ({_form(saved)} in the checkpoint, {_form(live)} here)")
            return
        for i, (item, other) in enumerate(zip(live, saved, strict=True)):
            fit(item, other, (*path, i), found)


def _fit_module(live: torch.nn.Module, saved: Any, path: Path, found: Mismatch) -> None:
    """Extra states must be there; whether they fit is for their modules to judge."""
    state = live.state_dict()
    extra = [key for key in state if key.rpartition(".")[2] == "_extra_state"]
    _fit_keys(state | dict.fromkeys(extra), saved, path, found)
    if not isinstance(saved, Mapping):
        return
    found.misshaped += [f"{show((*path, key))} (not a tensor)" for key, item in state.items()
                        if isinstance(item, torch.Tensor) and isinstance(saved.get(key), np.ndarray)]  # fmt: skip
    if not all(isinstance(key, str) for key in saved):
        found.misshaped.append(f"{show(path)} (keys that are not text in the checkpoint)")
    for key, about in getattr(saved, "_metadata", {}).items():
        if not isinstance(about, dict) or not isinstance(about.get("version"), int | None):
            found.misshaped.append(f"{show(path)} (metadata of {key!r} that no module writes)")


def _fit_keys(live: Mapping[Any, Any], saved: Any, path: Path, found: Mismatch) -> None:
    if not isinstance(saved, Mapping):
        found.misshaped.append(f"{show(path)} ({_form(saved)} in the checkpoint, {_form(live)} here)")
        return
    found.missing += [show((*path, key)) for key in live if key not in saved]
    if _holds_state(live) or not live:
        found.unexpected += [show((*path, key)) for key in saved if key not in live and live]
    for key, item in live.items():
        if key in saved:
            fit(item, saved[key], (*path, key), found)


def _fit_optimizer(live: Optimizer, saved: Any, path: Path, found: Mismatch) -> None:
    groups = saved.get("param_groups") if isinstance(saved, dict) else None
    if not isinstance(groups, list) or not _is_optimizer_state(saved.get("state"), groups):
        found.misshaped.append(f"{show(path)} ({_form(saved)} in the checkpoint, an optimizer here)")
        return
    ours, theirs = ([len(g["params"]) for g in side] for side in (live.param_groups, groups))
    if ours != theirs:
        found.misshaped.append(f"{show(path)} (groups of {theirs} parameters in the checkpoint, of {ours} here)")


def _is_optimizer_state(state: Any, groups: list[Any]) -> bool:
    """Whether these have the form of `Optimizer.state_dict()`, which its loading takes for granted."""
    return (
        isinstance(state, dict)
        and all(isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups)
        and all(isinstance(index, int | str) for g in groups for index in g["params"])
        and all(isinstance(state.get(index, {}), dict) for g in groups for index in g["params"])
    )


def _converts(live: torch.Tensor | np.ndarray[Any, Any], saved: torch.Tensor | np.ndarray[Any, Any]) -> bool:
    """Whether what was saved can be written over `live`, or, for an array, take its place."""
    try:
        if isinstance(live, np.ndarray):
            np.asarray(saved)
            return True
        return _copies(torch.as_tensor(saved).dtype, live.dtype)
    except (TypeError, ValueError, RuntimeError):
        return False


@functools.cache
def _copies(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether torch has a kernel for this conversion; bytes of the same dtype are always copied."""
    if source is target:
        return True
    try:
        torch.empty(1, dtype=target).copy_(torch.empty(1, dtype=source))
    except RuntimeError:
        return False
    return True


def _holds_state(value: Any) -> bool:
    """Whether there is anything in a container that is restored in place."""
    if isinstance(value, torch.Tensor | np.ndarray) or is_stateful(value):
        return True
    if isinstance(value, Mapping):
        return any(map(_holds_state, value.values()))
    return isinstance(value, list | tuple) and any(map(_holds_state, value))


def _form(value: Any) -> str:
    if isinstance(value, torch.Tensor | np.ndarray):
        return f"shape {tuple(value.shape)}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__


def apply(live: Any, saved: Any, strict: bool) -> Any:
    """Write `saved` into `live` where that can be done in place, and return what belongs in its place."""
    if isinstance(live, torch.nn.Module):
        live = unwrapped(live)
        with _writing(itertools.chain(live.parameters(), live.buffers())):
            live.load_state_dict(saved, strict=strict)
        return live
    if isinstance(live, Optimizer):
        _load_optimizer(live, saved)
        return live
    if is_stateful(live):
        live.load_state_dict(saved)
        return live
    if isinstance(live, torch.Tensor):
        with _writing([live]):
            _write_tensor(live, torch.as_tensor(saved))
        return live
    if isinstance(live, np.ndarray):
        if live.flags.writeable and live.dtype == np.asarray(saved).dtype:
            live[...] = saved
            return live
        return np.asarray(saved)
    if isinstance(live, MutableMapping):
        for key in list(live):
            if key in saved:
                live[key] = apply(live[key], saved[key], strict)
        if strict:
            for key in saved:
                if key not in live:
                    live[key] = saved[key]
        return live
    if isinstance(live, list | tuple) and _holds_state(live):
        items = [apply(item, other, strict) for item, other in zip(live, saved, strict=True)]
        if isinstance(live, MutableSequence):
            live[:] = items
            return live
        return live if all(a is b for a, b in zip(items, live, strict=True)) else type(live)(items)
    return saved


def _write_tensor(live: torch.Tensor, saved: torch.Tensor) -> None:
    """Copy in place, of DTensors what lies here; dimensions that are one item over and over are written once.

    The same dtype is copied as bytes: there are dtypes that torch can hold and not copy.
    """
    live, saved = local(live), local(saved)
    for dimension, stride in enumerate(live.stride()):
        if stride == 0 and live.shape[dimension] > 1:
            live, saved = live.narrow(dimension, 0, 1), saved.narrow(dimension, 0, 1)
    if live.dtype == saved.dtype and not (live.is_complex() or live.is_neg()):
        live, saved = dtypes.as_plain(live), dtypes.as_plain(saved)
    live.copy_(saved)


@contextmanager
def _writing(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """While inside, live tensors may be written to, those made in inference mode included."""
    with torch.no_grad(), torch.inference_mode() if any(t.is_inference() for t in tensors) else nullcontext():
        yield


def _load_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """`load_state_dict`, and then every state tensor in the very dtype it was saved in.

    torch casts floating state to the dtype of its parameter, which would round fp32 moments of bf16 parameters.
    """
    optimizer.load_state_dict(saved)
    for group, saved_group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        for p, index in zip(group["params"], saved_group["params"], strict=True):
            for name, value in saved["state"].get(index, {}).items():
                now = optimizer.state[p].get(name)
                if isinstance(value, torch.Tensor) and isinstance(now, torch.Tensor) and now.dtype != value.dtype:
                    optimizer.state[p][name] = value.to(now.device)


@contextmanager
def all_or_none(optimizers: list[Optimizer]) -> Iterator[None]:
    """While inside, optimizers load; where one can't, all are as they were before. They replace what they hold.

    Raises:
        StateMismatchError: one refused what it was given.
    """
    before = [(optimizer, dict(vars(optimizer))) for optimizer in optimizers]
    try:
        yield
    except Exception as error:
        for optimizer, members in before:
            vars(optimizer).update(members)
        raise StateMismatchError(
            f"an optimizer can't load what the checkpoint holds for it; nothing was changed: {error!r}"
        ) from error
