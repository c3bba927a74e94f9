"""What lies where in a chunk: the coder's hint. Any bytes are coded without loss under any hint."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from asyncckpt.format.image import Entry

BYTES = "U8"
SHORTEST = 4096
"""Bytes below which a run is not worth its own place, and counts to the one before it."""


class Run(NamedTuple):
    """`length` bytes of items of one safetensors dtype."""

    length: int
    dtype: str


class Layout:
    """The runs of a whole image: its header, then its tensors."""

    def __init__(self, header: int, entries: Iterable[Entry]) -> None:
        """`header` in bytes; `entries` as `parse_header` gives them."""
        self._starts, self._dtypes = [0], [BYTES]
        position = header
        for entry in sorted(entries, key=lambda entry: entry.offset):
            if entry.nbytes and entry.dtype != self._dtypes[-1]:
                self._starts.append(position)
                self._dtypes.append(entry.dtype)
            position += entry.nbytes
        self._size = position

    def runs(self, start: int, end: int) -> list[Run]:
        """Those of bytes `start` to `end` of the image, none shorter than `SHORTEST` unless it is the first."""
        found: list[Run] = []
        index = bisect_right(self._starts, start) - 1
        while start < end:
            stop = self._starts[index + 1] if index + 1 < len(self._starts) else self._size
            length = min(stop, end) - start
            if found and (length < SHORTEST or found[-1].dtype == self._dtypes[index]):
                found[-1] = Run(found[-1].length + length, found[-1].dtype)
            elif length:
                found.append(Run(length, self._dtypes[index]))
            start += length
            index += 1
        return found


def whole(size: int, layout: Sequence[Run]) -> Sequence[Run]:
    """`layout`, which must cover `size` bytes; without one, bytes of no known type."""
    if not layout:
        return [Run(size, BYTES)] if size else []
    if sum(run.length for run in layout) != size:
        raise ValueError(f"a layout of {sum(run.length for run in layout)} bytes for a chunk of {size}")
    return layout
