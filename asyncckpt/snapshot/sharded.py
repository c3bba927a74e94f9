"""DTensors: what this process holds of a tensor that is spread over ranks."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import torch

from asyncckpt.errors import UnsupportedStateError
from asyncckpt.format.tree import Path, show


@dataclass(frozen=True, slots=True)
class Shard:
    """Of a tensor of `shape`, the box of `size` at `offset`."""

    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def empty(self) -> bool:
        """Whether there is nothing in it although there is something in the tensor."""
        return 0 in self.size and 0 not in self.shape

    def in_bytes(self, width: int) -> Shard:
        """The same in a tensor of single bytes, `width` for each item."""
        return Shard((*self.shape, width), (*self.offset, 0), (*self.size, width))


def there_are_dtensors() -> bool:
    """Whether anybody can have made one: torch's module of them is not loaded without need."""
    return "torch.distributed.tensor" in sys.modules


def is_dtensor(value: Any) -> bool:
    return there_are_dtensors() and isinstance(value, sys.modules["torch.distributed.tensor"].DTensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What of `tensor` lies in this process: itself, but for DTensors."""
    if not is_dtensor(tensor):
        return tensor
    with torch.no_grad():
        part: torch.Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def shard_of(tensor: Any, path: Path) -> Shard:
    """Where the local part of a DTensor lies in the whole.

    Raises:
        UnsupportedStateError: it lies nowhere, because it is a sum yet to be made, or in several boxes.
    """
    shape = tuple(tensor.shape)
    if any(placement.is_partial() for placement in tensor.placements):
        raise UnsupportedStateError(
            f"{show(path)} is a DTensor with a partial placement {tensor.placements}; redistribute it first",
            path=show(path),
        )
    if tensor.device_mesh.get_coordinate() is None:
        return Shard(shape, (0,) * len(shape), (0,) * len(shape))
    boxes = tensor.__create_chunk_list__()
    if len(boxes) != 1 or math.prod(boxes[0].sizes) != local(tensor).numel():
        raise UnsupportedStateError(
            f"{show(path)} is a DTensor whose local part is not one box of it ({tensor.placements}); redistribute it",
            path=show(path),
        )
    return Shard(shape, tuple(boxes[0].offsets), tuple(boxes[0].sizes))
