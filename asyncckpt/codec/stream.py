"""Writing and reading a stream of bytes front to back, within bounds."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from asyncckpt.errors import CorruptCheckpointError

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]

ALIGN = 64
"""Raw planes start at multiples of this, counted from the start of the stream, so that they are read where they lie."""


PAGE = 4096
"""Stored chunks are padded to a multiple of this, so that the next one can be written with O_DIRECT."""


class Full(Exception):
    """The stream would be longer than what it stands for."""


class Sink:
    """A stream that grows in `room`."""

    def __init__(self, room: Bytes) -> None:
        self._room = room
        self.size = 0

    def pack(self, layout: struct.Struct, *values: int) -> None:
        layout.pack_into(self._room.data, self._claim(layout.size), *values)

    def write(self, data: bytes | Array) -> None:
        flat = np.frombuffer(data, np.uint8)
        start = self._claim(len(flat))
        self._room[start : self.size] = flat

    def aligned(self, count: int) -> Bytes:
        """`count` bytes to be filled in, aligned. `cut` gives them back."""
        self.pad(ALIGN)
        start = self._claim(count)
        return self._room[start : self.size]

    def pad(self, align: int) -> None:
        start = self._claim(-self.size % align)
        self._room[start : self.size] = 0

    def cut(self, size: int) -> None:
        """Forget all that came after the first `size` bytes."""
        self.size = size

    def view(self) -> memoryview:
        return self._room[: self.size].data

    def _claim(self, count: int) -> int:
        start = self.size
        if start + count > len(self._room):
            raise Full
        self.size += count
        return start


class Source:
    """The stream in `data`. Whatever would reach over its end is a `CorruptCheckpointError`."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0

    def unpack(self, layout: struct.Struct) -> tuple[int, ...]:
        return layout.unpack(self.read(layout.size))

    def read(self, count: int) -> memoryview:
        start, end = self._at, self._at + count
        if end > len(self._data):
            raise CorruptCheckpointError(f"a stream of {len(self._data)} bytes that needs {end}")
        self._at = end
        return self._data[start:end]

    def array(self, dtype: Any, count: int) -> Array:
        """`count` numbers, in place."""
        return np.frombuffer(self.read(count * np.dtype(dtype).itemsize), dtype)

    def aligned(self, count: int) -> Bytes:
        self.read(-self._at % ALIGN)
        return self.array(np.uint8, count)

    def rest(self) -> memoryview:
        return self._data[self._at :]


class Scratch:
    """Memory that is touched once and used again: arrays by name, which grow to the largest size asked for.

    They start at a page, so that what is in them can be written with O_DIRECT.
    """

    def __init__(self) -> None:
        self._held: dict[str, Bytes] = {}

    def array(self, name: str, dtype: Any, count: int) -> Array:
        """The first `count` items under this name; what they hold is whatever was left there."""
        size = count * np.dtype(dtype).itemsize
        held = self._held.get(name)
        if held is None or len(held) < size:
            room = np.zeros(size + PAGE, np.uint8)
            start = -room.ctypes.data % PAGE
            held = self._held[name] = room[start : start + size]
        return held[:size].view(dtype)
