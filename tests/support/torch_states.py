"""Comparing states bit by bit, taking them there and back, and holding the background copy still."""

from __future__ import annotations

import copy
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch

import asyncckpt
from asyncckpt.format import names

PATIENCE = 30.0
_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: torch.Tensor) -> bytes:
    """The items of any strided tensor, row-major, as bytes."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    if plain.dtype == torch.complex128:
        plain = torch.view_as_real(plain)
    return plain.view(_SAME_SIZE[plain.dtype.itemsize]).contiguous().numpy().tobytes()


def difference(first: Any, second: Any, path: str = "it") -> str | None:
    """Where two values differ in type, structure or any bit; None where they do not."""
    if isinstance(first, torch.Tensor):
        if not isinstance(second, torch.Tensor) or (first.dtype, first.shape) != (second.dtype, second.shape):
            return f"{path}: {first!r} and {second!r}"
        return None if bits(first) == bits(second) else f"{path}: other bits"
    if type(first) is not type(second):
        return f"{path}: {type(first)} and {type(second)}"
    if isinstance(first, np.ndarray):
        same = (first.dtype.str, first.shape, first.tobytes()) == (second.dtype.str, second.shape, second.tobytes())
        return None if same else f"{path}: {first!r} and {second!r}"
    if isinstance(first, np.generic):
        same = (first.dtype.str, first.tobytes()) == (second.dtype.str, second.tobytes())
        return None if same else f"{path}: {first!r} and {second!r}"
    if isinstance(first, float):
        return None if struct.pack("d", first) == struct.pack("d", second) else f"{path}: {first!r} and {second!r}"
    if isinstance(first, complex):
        return difference([first.real, first.imag], [second.real, second.imag], path)
    if isinstance(first, Mapping):
        return difference(list(first), list(second), f"{path}.keys()") or _first_difference(
            path, ((key, first[key], second[key]) for key in first)
        )
    if isinstance(first, list | tuple):
        if len(first) != len(second):
            return f"{path}: {len(first)} and {len(second)} items"
        return _first_difference(path, ((i, a, b) for i, (a, b) in enumerate(zip(first, second, strict=True))))
    return None if first == second else f"{path}: {first!r} and {second!r}"


def _first_difference(path: str, items: Iterator[tuple[Any, Any, Any]]) -> str | None:
    return next((found for key, a, b in items if (found := difference(a, b, f"{path}[{key!r}]"))), None)


def run(directory: Path, **options: Any) -> asyncckpt.Checkpointer:
    """A Checkpointer that writes on a thread."""
    return asyncckpt.Checkpointer(directory, **{"writer": "thread", **options})


def round_trip(directory: Path, value: Any, **options: Any) -> Any:
    """`value` saved as a part of its own, and loaded."""
    with run(directory, **options) as ckpt:
        ckpt.save(0, {"part": value})
    return asyncckpt.load(directory)["part"]


def frozen(value: Any) -> Any:
    """A deep copy that no later change of `value` can reach; objects with a state as that state."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if hasattr(value, "state_dict"):
        return frozen(value.state_dict())
    if isinstance(value, Mapping):
        return type(value)((key, frozen(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return type(value)(frozen(item) for item in value)
    return copy.deepcopy(value)


@contextmanager
def copies_held(ckpt: asyncckpt.Checkpointer) -> Iterator[Event]:
    """Until the event is set, or the block ends, the background thread copies nothing. Whoever joins copies himself."""
    go, stands = Event(), Event()

    def stand() -> None:
        stands.set()
        go.wait(PATIENCE)

    ckpt._snapshotter.pool.submit(stand)
    assert stands.wait(PATIENCE)
    try:
        yield go
    finally:
        go.set()


def files(directory: Path) -> list[str]:
    """Everything that lies in a directory, by relative path."""
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*"))


def damage(directory: Path, step: int, part: str = "model", position: int = -1) -> None:
    """Flip a bit of a committed image."""
    path = asyncckpt.open(directory).path(step) / names.image_file(part)
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
