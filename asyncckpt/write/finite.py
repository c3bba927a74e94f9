"""Which tensors of an image hold NaN or inf, found chunk by chunk while it is written.

A floating-point number is NaN or inf if and only if the bits of its exponent are all ones (IEEE 754; of F8_E4M3, which
has no inf: if all bits but the sign are). So, read as integers, the positive ones that are not finite are the greatest
of the signed integers, and the negative ones the greatest of the unsigned: two maxima tell, without a copy, and numpy
finds them with the GIL released.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from asyncckpt.format.image import ITEM_SIZE, Entry

LEAST = {"F8_E4M3": 0x7F, "F8_E5M2": 0x7C, "F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F80 << 16, "F64": 0x7FF0 << 48}
"""By dtype, the least integer that is the bits of a positive number which is not finite."""
_PIECE = 128 << 10
"""Bytes looked at in one go: both looks find them in the cache."""


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Tensors of one dtype that lie side by side: `start` and `end` are their bytes in the image."""

    start: int
    end: int
    dtype: str
    entries: list[Entry]


class FiniteScan:
    """Looks at the bytes of one image; chunks may come in any order, from several threads."""

    def __init__(self, entries: dict[str, Entry]) -> None:
        self._stretches = list(_stretches(entries))
        self._starts = [stretch.start for stretch in self._stretches]
        self._found: set[str] = set()

    def look(self, start: int, data: memoryview) -> None:
        """Take the bytes from `start` of the image on; no item may lie across their ends."""
        for stretch in self._stretches[max(0, bisect_right(self._starts, start) - 1) :]:
            if stretch.start >= start + len(data):
                break
            if not _finite(_cut(data, start, stretch.start, stretch.end), stretch.dtype):
                self._name(stretch, start, data)

    def _name(self, stretch: _Stretch, start: int, data: memoryview) -> None:
        for entry in stretch.entries:
            end = entry.offset + entry.nbytes
            if entry.name not in self._found and not _finite(_cut(data, start, entry.offset, end), entry.dtype):
                self._found.add(entry.name)

    @property
    def found(self) -> list[str]:
        """The tensors that are not finite, by name, as far as chunks have been looked at."""
        return sorted(self._found)


def _stretches(entries: dict[str, Entry]) -> Iterator[_Stretch]:
    current: list[Entry] = []
    for entry in sorted((e for e in entries.values() if e.nbytes), key=lambda e: e.offset):
        if current and (entry.dtype, entry.offset) != (current[0].dtype, current[-1].offset + current[-1].nbytes):
            yield from _stretch(current)
            current = []
        current.append(entry)
    yield from _stretch(current)


def _stretch(entries: list[Entry]) -> Iterator[_Stretch]:
    if entries and entries[0].dtype in LEAST:
        yield _Stretch(entries[0].offset, entries[-1].offset + entries[-1].nbytes, entries[0].dtype, entries)


def _cut(data: memoryview, origin: int, start: int, end: int) -> memoryview:
    """What `data`, which begins at `origin`, holds of the bytes from `start` to `end`."""
    return data[max(start - origin, 0) : max(end - origin, 0)]


def _finite(data: memoryview, dtype: str) -> bool:
    size, least = ITEM_SIZE[dtype], LEAST[dtype]
    negative = least | 1 << 8 * size - 1
    for start in range(0, len(data), _PIECE):
        piece = np.frombuffer(data[start : start + _PIECE], f"<i{size}")
        if int(piece.max()) >= least or int(piece.view(f"<u{size}").max()) >= negative:
            return False
    return True
