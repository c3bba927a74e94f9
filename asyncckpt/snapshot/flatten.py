"""State to leaf tree and tensors. Adds these nodes to those of `asyncckpt.format.tree`:

tensor   "n": name in the image. Where that entry is not the tensor itself, also "d": dtype, "s": shape,
         "st": strides (in items), "o": offset in the entry (in bytes)
ndarray  "n": name in the image, "d": numpy dtype, "s": shape
module   "v": {name: node}, "m": the state dict's _metadata
dtype, device "v": text;  size "v": [int, ...]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from asyncckpt.errors import UnsupportedStateError
from asyncckpt.format.tree import TAG, Encoder, Node, Path, show, unsupported
from asyncckpt.snapshot import dtypes
from asyncckpt.snapshot.sharded import Shard, is_dtensor, local, shard_of


@dataclass(slots=True)
class Leaf:
    """A tensor found in the state. `node` is its place in the leaf tree, completed when its place is known.

    `made` says that `tensor` was made of the value at this walk, and may not follow what becomes of the value. Of a
    DTensor it is the local part, and `shard` says which that is.
    """

    path: Path
    tensor: torch.Tensor
    node: dict[str, Any]
    made: bool
    shard: Shard | None = None


class Flattener(Encoder):
    """Encodes one part; the tensors met are in `leaves`, in the order of the walk."""

    def __init__(self) -> None:
        self.leaves: list[Leaf] = []

    def other(self, value: Any, path: Path) -> Node:
        if isinstance(value, torch.Tensor):
            return self.tensor(value, path)
        if type(value) is np.ndarray:
            return self._array(value, path)
        if isinstance(value, torch.dtype):
            return {TAG: "dtype", "v": dtypes.name(value)}
        if isinstance(value, torch.device):
            return {TAG: "device", "v": str(value)}
        if isinstance(value, torch.Size):
            return {TAG: "size", "v": list(value)}
        if isinstance(value, torch.nn.Module):
            return self._module(value, path)
        if is_stateful(value):
            return self.encode(value.state_dict(), path)
        raise unsupported(value, path)

    def tensor(self, value: torch.Tensor, path: Path) -> Node:
        node: dict[str, Any] = {TAG: "tensor"}
        if is_dtensor(value):
            part = _storable(local(value), path)
            self.leaves.append(Leaf(path, part, node, made=True, shard=shard_of(value, path)))
            return node
        stored = _storable(value, path)
        self.leaves.append(Leaf(path, stored, node, made=stored is not value))
        return node

    def _array(self, value: np.ndarray[Any, Any], path: Path) -> Node:
        node = {TAG: "ndarray", "d": self._dtype(value.dtype, path), "s": list(value.shape)}
        data = np.frombuffer(value.tobytes(), np.uint8) if value.nbytes else np.empty(0, np.uint8)
        self.leaves.append(Leaf(path, torch.from_numpy(data.copy()), node, made=True))
        return node

    def _module(self, value: torch.nn.Module, path: Path) -> Node:
        state = unwrapped(value).state_dict(keep_vars=True)
        metadata = getattr(state, "_metadata", None)
        if type(state) not in (dict,) and metadata is None:
            return self.encode(state, path)
        return {
            TAG: "module",
            "v": self.encode(dict(state), path),
            "m": None if metadata is None else self.encode(dict(metadata), path),
        }


def unwrapped(value: torch.nn.Module) -> torch.nn.Module:
    """The module that a DistributedDataParallel wraps: whether it does so is no part of the state."""
    return value.module if isinstance(value, torch.nn.parallel.DistributedDataParallel) else value


def is_stateful(value: Any) -> bool:
    """Whether `value` has a `state_dict()` to save and a `load_state_dict()` to restore."""
    return not isinstance(value, type) and _callable(value, "state_dict") and _callable(value, "load_state_dict")


def _callable(value: Any, name: str) -> bool:
    method: Callable[..., Any] | None = getattr(value, name, None)
    return callable(method)


def _storable(tensor: torch.Tensor, path: Path) -> torch.Tensor:
    """`tensor`, or a plain equal of it.

    Raises:
        UnsupportedStateError: a kind of tensor that is more than strided bytes.
    """

    def refuse(what: str, do: str) -> UnsupportedStateError:
        return UnsupportedStateError(f"{show(path)} is {what}, which can't be stored. {do}", path=show(path))

    if type(tensor) is not torch.Tensor and type(tensor) is not torch.nn.Parameter:
        raise refuse(
            f"a {type(tensor).__module__}.{type(tensor).__qualname__}, a subclass of Tensor",
            "Save the plain tensors it is made of.",
        )
    if tensor.dtype in dtypes.QUANTIZED:
        raise refuse(f"a quantized tensor ({tensor.dtype})", "Save tensor.int_repr() with its scale and zero point.")
    if tensor.layout != torch.strided:
        raise refuse(f"a tensor of layout {tensor.layout}", "Save its indices and values.")
    if tensor.is_meta:
        raise refuse("a meta tensor, which has no bytes", "Materialize it first.")
    if tensor.numel() and not tensor.data_ptr():
        raise refuse("a tensor whose memory has been freed", "Gather it first.")
    if tensor.is_conj() or tensor.is_neg():
        return tensor.detach().resolve_conj().resolve_neg()
    return tensor
