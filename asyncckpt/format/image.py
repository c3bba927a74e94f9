"""The byte image of one part: a valid safetensors file.

    8 bytes   N, the length of the header, little-endian
    N bytes   JSON: name -> {dtype, shape, data_offsets}, padded with spaces so that 8 + N is a multiple of 4096
    the rest  the tensors, sorted so that each lies at a multiple of its item size, without holes

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from asyncckpt.errors import CorruptCheckpointError

PAGE = 4096
ITEM_SIZE = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
"""Bytes of an item, by dtype: those that every safetensors reader of today knows."""

MAX_HEADER = 100_000_000
"""The reference reader's cap on N."""

MAX_DIMENSIONS = 64
"""That of torch and numpy. Without a bound the product of a hostile shape takes hours."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored tensor: its dtype code, shape, and place in the image (bytes from the start of the file)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Spec:
    """A tensor to be stored. `align` is its item size as its owner sees it (a complex128 stored as U8 has 16).

    `still` ones are likely not to change: they lie together, so that chunks are found that do not.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    align: int
    still: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]


@dataclass(frozen=True)
class Image:
    """Where everything lies in one image. `entries` are in the order of the specs; `size` is in bytes."""

    header: bytes
    entries: tuple[Entry, ...]
    size: int


def layout(specs: Sequence[Spec], metadata: Mapping[str, str] | None = None) -> Image:
    """Lay tensors out without holes, each at a multiple of its alignment; those of whole cache lines come first.

    `metadata` goes into the header for readers of other libraries.

    Raises:
        ValueError: more names than a safetensors header can hold (100 MB).
    """
    order = sorted(range(len(specs)), key=lambda i: _order(specs[i]))
    starts = [0] * len(specs)
    position = 0
    table: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    for i in order:
        spec = specs[i]
        starts[i] = position
        table[spec.name] = {
            "dtype": spec.dtype,
            "shape": spec.shape,
            "data_offsets": (position, position + spec.nbytes),
        }
        position += spec.nbytes
    text = msgspec.json.encode(table)
    text += b" " * (-(len(text) + 8) % PAGE)
    if len(text) > MAX_HEADER:
        raise ValueError(f"a header of {len(text)} bytes; safetensors allows {MAX_HEADER}")
    header = struct.pack("<Q", len(text)) + text
    entries = tuple(
        Entry(spec.name, spec.dtype, spec.shape, len(header) + start, spec.nbytes)
        for spec, start in zip(specs, starts, strict=True)
    )
    return Image(header, entries, len(header) + position)


def _order(spec: Spec) -> tuple[bool, int, bool]:
    return spec.nbytes % 64 != 0, -spec.align, not spec.still


class _Header(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def header_size(first: bytes, size: int) -> int:
    """Bytes of the header (its length field included), from the first eight bytes of an image of `size` bytes."""
    if len(first) < 8:
        raise CorruptCheckpointError("an image shorter than eight bytes")
    (length,) = struct.unpack("<Q", first[:8])
    if length > MAX_HEADER or 8 + length > size:
        raise CorruptCheckpointError(f"an image of {size} bytes with a header of {length}")
    return 8 + int(length)


def parse_header(header: bytes, size: int) -> dict[str, Entry]:
    """The entries of an image of `size` bytes whose header is `header`, by name.

    Raises:
        CorruptCheckpointError: not JSON of the right form, or tensors that overlap, leave holes or reach outside.
    """
    try:
        table = msgspec.json.decode(header[8:], type=dict[str, Any])
        table.pop("__metadata__", None)
        raw = msgspec.convert(table, type=dict[str, _Header])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptCheckpointError(f"not a safetensors header: {error}") from error
    entries = {}
    position = 0
    for name, item in sorted(raw.items(), key=lambda pair: pair[1].data_offsets):
        start, end = item.data_offsets
        width = ITEM_SIZE.get(item.dtype)
        if width is None or len(item.shape) > MAX_DIMENSIONS or any(n < 0 for n in item.shape):
            shape = item.shape[:MAX_DIMENSIONS]
            raise CorruptCheckpointError(f"tensor {name!r}: dtype {item.dtype!r}, shape {shape}", tensor=name)
        if start != position or end - start != math.prod(item.shape) * width:
            raise CorruptCheckpointError(f"tensor {name!r}: its place and its shape contradict each other", tensor=name)
        entries[name] = Entry(name, item.dtype, tuple(item.shape), len(header) + start, end - start)
        position = end
    if len(header) + position != size:
        raise CorruptCheckpointError(f"tensors of {position} bytes in an image of {size}")
    return entries
