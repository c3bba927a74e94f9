"""Which memory changes only inside `optimizer.step()`, and who waits there.

torch calls a global hook before every optimizer's step. It joins the copies that step would change: on the CPU by
waiting (and lending a hand), on CUDA by a stream wait. A copy is joined before `load_state_dict` of what is saved, too.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from asyncckpt.snapshot.sharded import local

_seen: weakref.WeakSet[Optimizer] = weakref.WeakSet()
_flights: dict[int, Flight] = {}
_clocks: weakref.WeakSet[Clock] = weakref.WeakSet()
_lock = threading.Lock()
_installed = False


class Flight(Protocol):
    """A copy under way."""

    params: frozenset[int]
    """`id` of the parameters whose optimizer must wait."""

    def fence(self) -> None:
        """Return when a change can no longer reach the snapshot."""


class Clock(Protocol):
    def tick(self, optimizer: Optimizer) -> None:
        """A step begins."""


def install(clock: Clock) -> None:
    """Listen to every optimizer from now on; `clock` hears of each step for as long as it lives."""
    global _installed
    with _lock:
        if not _installed:
            register_optimizer_step_pre_hook(_before_step)
            _installed = True
        _clocks.add(clock)


def take_off(flight: Flight) -> None:
    _flights[id(flight)] = flight


def land(flight: Flight) -> None:
    _flights.pop(id(flight), None)


def _ground_in_child() -> None:
    """After a fork: the copies go on in the parent only; nothing in the child may wait for them."""
    _flights.clear()
    _clocks.clear()


os.register_at_fork(after_in_child=_ground_in_child)


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    _seen.add(optimizer)
    for flight in list(_flights.values()):
        if any(id(p) in flight.params for group in optimizer.param_groups for p in group["params"]):
            flight.fence()
    for clock in list(_clocks):
        clock.tick(optimizer)


class _JoinBeforeLoad:
    """The hook before `load_state_dict`. A copied or pickled module takes along a no-op instead."""

    def __call__(self, *args: Any) -> None:
        for flight in list(_flights.values()):
            flight.fence()

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, ("", "format")


_join_before_load = _JoinBeforeLoad()


def guard_loading(value: Any) -> Any:
    """Join copies before `value.load_state_dict()`; the handle that is returned takes the hook off again."""
    if isinstance(value, torch.nn.Module | Optimizer):
        return value.register_load_state_dict_pre_hook(_join_before_load)
    return None


class Owned:
    """Memory that changes only in the step of an optimizer: its parameters, and the tensors of its state."""

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        tensors, params = _tensors_of(optimizers)
        self._pointers = [t.data_ptr() for t in tensors]
        self._memory = {
            t.data_ptr(): t.numel() * t.dtype.itemsize
            for t in tensors
            if t.layout == torch.strided and not t.is_inference()
        }
        self.params = frozenset(params)

    def holds(self, optimizers: Iterable[Optimizer]) -> bool:
        """Whether the same optimizers still own the same memory."""
        tensors, params = _tensors_of(optimizers)
        return [t.data_ptr() for t in tensors] == self._pointers and self.params == set(params)

    def covers(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is such memory, whole."""
        size = tensor.numel() * tensor.dtype.itemsize
        return self._memory.get(tensor.data_ptr(), -1) == size and not tensor.is_inference()


def _tensors_of(optimizers: Iterable[Optimizer]) -> tuple[list[torch.Tensor], list[int]]:
    """All that these optimizers, and those that were seen to step, change in their steps; and `id` of the parameters.

    One whose step may be replayed by a CUDA graph calls no hook, and owns nothing.
    """
    tensors: list[torch.Tensor] = []
    params: list[int] = []
    for optimizer in sorted({*optimizers, *_seen}, key=id):
        if any(group.get("capturable") for group in optimizer.param_groups):
            continue
        for group in optimizer.param_groups:
            tensors.extend(map(local, group["params"]))
            params.extend(map(id, group["params"]))
        for entry in optimizer.state.values():
            if isinstance(entry, dict):
                tensors.extend(local(value) for value in entry.values() if isinstance(value, torch.Tensor))
    return tensors, params
