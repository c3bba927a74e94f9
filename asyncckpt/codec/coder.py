"""A chunk <-> its stored bytes.

    u8   version, 1
    units, until the decoded size is reached:
        u8   kind: 0 words, 1 floats of 16 bits, 2 floats of 32 bits
        u8   words: bytes in one (1, 2, 4, 8); else the field (halves.py): 0 high byte, 1 exponent
        u8   words: bits that they were rotated to the left by; else 0
        u8   1: these are differences from the base; else 0
        u32  decoded bytes
        words             their planes (words.py)
        floats of 16 bits (halves.py)
        floats of 32 bits the low 16 bits of each, as raw bytes from the next multiple of 64 of the stream on; then
                          their high 16 bits, as floats of 16 bits
    zeros, fewer than 4096

Everything is little-endian. Decoding needs these bytes, the decoded size, and the base where the codec is "delta".
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from asyncckpt.codec import halves, planes, words
from asyncckpt.codec.frames import Frames
from asyncckpt.codec.layout import SHORTEST, Run, whole
from asyncckpt.codec.stream import PAGE, Array, Bytes, Full, Scratch, Sink, Source
from asyncckpt.errors import CorruptCheckpointError

RAW, ZSTD, DELTA = "raw", "zstd", "delta"
CODECS = (RAW, ZSTD, DELTA)
"""Names of codecs, as chunk tables hold them."""

UNIT = 1 << 21
"""Most bytes of a unit: memory for decoding is bounded by this, whatever a stream declares."""

_VERSION = struct.Struct("<B")
_UNIT = struct.Struct("<BBBBI")
_WORDS, _HALF, _SINGLE = range(3)


class _Family(NamedTuple):
    """How items of a dtype are treated: bytes in one, and for floats the rotation that makes bytes of the exponent."""

    width: int
    rotation: int = 0
    floats: bool = False


_FAMILIES = {
    "F16": _Family(2, 1, True), "BF16": _Family(2, 1, True), "F32": _Family(4, 1, True), "F64": _Family(8, 4, True),
    "I16": _Family(2), "U16": _Family(2), "I32": _Family(4), "U32": _Family(4), "I64": _Family(8), "U64": _Family(8),
}  # fmt: skip
_PLAIN = _Family(1)


class Coder:
    """Codes chunks, with scratch memory of its own (about three chunks), for one thread at a time."""

    def __init__(self) -> None:
        self._scratch = Scratch()
        self._frames = Frames()

    def encode(self, chunk: Any, layout: Sequence[Run] = (), base: Any = None) -> tuple[str, memoryview]:
        """The codec and the stored bytes of `chunk`, a buffer of bytes.

        The bytes are `chunk` itself where nothing would make it smaller ("raw"), else memory of the coder that the
        next call overwrites. `layout` says what its bytes are. `base` holds as many bytes of the same layout; where
        it was used, the codec is "delta".

        Raises:
            ValueError: `layout` or `base` is not of the chunk's size.
        """
        data = np.frombuffer(chunk, np.uint8)
        other = None if base is None else np.frombuffer(base, np.uint8)
        if other is not None and len(other) != len(data):
            raise ValueError(f"a base of {len(other)} bytes for a chunk of {len(data)}")
        runs = whole(len(data), layout)
        most = max(0, len(data) - 1) // PAGE * PAGE
        sink = Sink(self._scratch.array("stored", np.uint8, most))
        differs = False
        try:
            sink.pack(_VERSION, 1)
            at = 0
            for run in runs:
                for unit, family in _units(at, run):
                    differs |= self._encode_unit(data[unit], None if other is None else other[unit], family, sink)
                at += run.length
            sink.pad(PAGE)
        except Full:
            return RAW, memoryview(chunk)
        return DELTA if differs else ZSTD, sink.view()

    def decode(self, codec: str, stored: Any, out: Any, base: Any = None) -> None:
        """Fill `out`, a writable buffer of exactly the decoded size, from `stored`.

        Memory is bounded by `UNIT` beside what is given, whatever the stream declares.

        Raises:
            CorruptCheckpointError: the stream is damaged, or not of this codec or size. `out` may be partly filled.
                Not all damage shows here: the caller checks the digest.
            ValueError: `base` is not of the chunk's size.
        """
        target = np.frombuffer(out, np.uint8)
        other = np.frombuffer(base, np.uint8) if codec == DELTA else None
        if other is not None and len(other) != len(target):
            raise ValueError(f"a base of {len(other)} bytes for a chunk of {len(target)}")
        source = Source(memoryview(stored))
        if codec == RAW:
            np.copyto(target, source.array(np.uint8, len(target)))
        elif codec in (ZSTD, DELTA):
            if source.unpack(_VERSION) != (1,):
                raise CorruptCheckpointError("a stream of a version that this asyncckpt does not know")
            at = units = 0
            while at < len(target):
                at += self._decode_unit(source, target[at:], None if other is None else other[at:])
                units += 1
                if units > 3 * (2 + len(target) // SHORTEST):
                    raise CorruptCheckpointError(f"{units} units for {at} bytes")
        else:
            raise CorruptCheckpointError(f"the codec {codec!r} is not one that this asyncckpt knows")
        rest = source.rest()
        if len(rest) >= PAGE or bytes(rest).strip(b"\0"):
            raise CorruptCheckpointError("a stream that goes on after its end")

    def _encode_unit(self, data: Bytes, base: Bytes | None, family: _Family, sink: Sink) -> bool:
        """Whether `base` was used."""
        items = words.unsigned(data, family.width)
        sample = items[:: planes.step(len(items))].copy()
        advice = _advise(sample, family)
        if base is not None:
            other = words.unsigned(base, family.width)
            change = np.empty_like(sample)
            words.subtract(sample, other[:: planes.step(len(items))], change, self._scratch)
            if _bits_of_planes(change) < advice.bits:
                sink.pack(_UNIT, _WORDS, family.width, 0, 1, len(data))
                change = self._scratch.array("whole", items.dtype, len(items))
                words.subtract(items, other, change, self._scratch)
                words.encode(change, sink, self._frames, self._scratch, search=False)
                return True
        if advice.field is not None:
            sink.pack(_UNIT, _HALF if family.width == 2 else _SINGLE, advice.field, 0, 0, len(data))
            halves.encode(self._high(items, sink), advice.field, sink, self._frames, self._scratch)
            return False
        sink.pack(_UNIT, _WORDS, family.width, family.rotation, 0, len(data))
        if family.rotation:
            rotated = self._scratch.array("whole", items.dtype, len(items))
            words.rotate(items, family.rotation, rotated)
            items = rotated
        words.encode(items, sink, self._frames, self._scratch, search=not family.floats)
        return False

    def _high(self, items: Array, sink: Sink) -> Array:
        """The high 16 bits of `items`; where there are low ones, they are written."""
        if items.itemsize == 2:
            return items
        np.copyto(sink.aligned(2 * len(items)).view(np.uint16), items, casting="unsafe")
        shifted = self._scratch.array("whole", np.uint32, len(items))
        np.right_shift(items, np.uint32(16), out=shifted)
        high = self._scratch.array("high", np.uint16, len(items))
        np.copyto(high, shifted, casting="unsafe")
        return high

    def _decode_unit(self, source: Source, target: Bytes, base: Bytes | None) -> int:
        """The bytes that were filled."""
        kind, how, rotation, differs, size = source.unpack(_UNIT)
        if not 0 < size <= min(UNIT, len(target)):
            raise CorruptCheckpointError(f"a unit of {size} bytes where {len(target)} are missing")
        data = target[:size]
        if kind == _WORDS and how in words.WIDTHS and size % how == 0 and rotation < 8 * how:
            items = words.unsigned(data, how)
            words.decode(source, items)
            if rotation:
                words.rotate(items, 8 * how - rotation, items)
            if differs == 1 and rotation == 0 and base is not None:
                words.add(items, words.unsigned(base[:size], how), self._scratch)
                return size
        elif kind == _HALF and how in halves.FIELDS and rotation == 0 and size % (2 * halves.GRAIN) == 0:
            halves.decode(source, how, words.unsigned(data, 2), self._scratch)
        elif kind == _SINGLE and how in halves.FIELDS and rotation == 0 and size % (4 * halves.GRAIN) == 0:
            self._decode_singles(source, how, words.unsigned(data, 4))
        else:
            raise CorruptCheckpointError(f"a unit of the unknown kind {(kind, how, rotation, differs)}")
        if differs:
            raise CorruptCheckpointError("differences from a base that there is not")
        return size

    def _decode_singles(self, source: Source, field: int, items: Array) -> None:
        low = source.aligned(2 * len(items)).view(np.uint16)
        high = self._scratch.array("high", np.uint16, len(items))
        halves.decode(source, field, high, self._scratch)
        np.copyto(items, low)
        np.copyto(items.view(np.uint16)[1::2], high)


class _Advice(NamedTuple):
    """The field to code, or None for all byte planes; and the bits that an item will take."""

    field: int | None
    bits: float


def _advise(sample: Array, family: _Family) -> _Advice:
    """How to code items without a base, from some of them."""
    if family.floats and family.width == 2 and (half := halves.advise(sample)):
        return _Advice(half.field, half.bits)
    if family.floats and family.width == 4 and _bits_of_planes(sample.astype(np.uint16)) > 16 * planes.PAYS:
        half = halves.advise((sample >> 16).astype(np.uint16))
        if half:
            return _Advice(half.field, 16 + half.bits)
    if family.rotation:
        rotated = np.empty_like(sample)
        words.rotate(sample, family.rotation, rotated)
        sample = rotated
    return _Advice(None, _bits_of_planes(sample))


def _bits_of_planes(sample: Array) -> float:
    return sum(planes.entropy(planes.histogram(plane)) for plane in words.bytes_of(sample))


def _units(start: int, run: Run) -> Iterator[tuple[slice, _Family]]:
    """The units of a run that starts at `start` of its chunk: whole rows, then whole grains, then the bytes left."""
    family = _FAMILIES.get(run.dtype, _PLAIN)
    end = start + run.length
    for grain in (halves.ROW * family.width, halves.GRAIN * family.width, 1):
        stop = start + (end - start) // grain * grain
        most = UNIT // 2 if family.floats and family.width == 2 else UNIT  # passed over most often: for the caches
        for at in range(start, stop, most):
            yield slice(at, min(at + most, stop)), _PLAIN if grain == 1 else family
        start = stop
