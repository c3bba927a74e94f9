"""One plane of bytes <-> its coded form, as a sample of it advises.

u8   form: 0 raw, 1 one byte repeated, 2 zstd
raw                the bytes, from the next multiple of 64 of the stream on
one byte repeated  that byte
zstd               u32 size of the frame, and the frame
"""

from __future__ import annotations

import math
import struct

import numpy as np

from asyncckpt.codec.frames import Frames, inflate
from asyncckpt.codec.stream import Array, Bytes, Sink, Source
from asyncckpt.errors import CorruptCheckpointError

RAW, REPEATED, FRAME = range(3)
_FORM = struct.Struct("<B")
_REPEATED = struct.Struct("<BB")
_FRAME = struct.Struct("<BI")

SAMPLE = 2048
"""Numbers that a sample holds."""

PAYS = 0.97
"""A plane is coded where that seems to make it smaller than this share of itself."""

_REPEATING = 1.5
"""Bits per byte below which repetitions are looked for: Huffman codes alone can't do with less than one."""

_TRIAL = 4096

_N_LOG_N = np.array([n * math.log2(n) if n else 0.0 for n in range(4 * SAMPLE)])


def step(count: int) -> int:
    """Every how many-th of `count` items make a sample. Odd, so that all places of a period of two are met."""
    return max(1, count // SAMPLE) | 1


def sample(items: Bytes) -> Bytes:
    return items[:: step(len(items))]


def histogram(symbols: Array) -> Array:
    return np.bincount(symbols, minlength=256)


def entropy(counts: Array) -> float:
    """Bits per symbol, from a histogram of a sample, with the Miller-Madow correction for its being one.

    Source: G. Miller, "Note on the bias of information estimates" (1955).
    """
    total = int(counts.sum())
    plain = math.log2(total) - float(_N_LOG_N[counts].sum()) / total
    return min(8.0, plain + (int(np.count_nonzero(counts)) - 1) / (2 * total * math.log(2)))


def encode(plane: Bytes, sink: Sink, frames: Frames, *, search: bool) -> None:
    """Code `plane`, which is at least one byte. `search`: repetitions are likely, even where the bytes are even."""
    counts = histogram(sample(plane))
    bits = entropy(counts)
    if int(counts.max()) == int(counts.sum()) and int(plane.min()) == int(plane.max()):
        sink.pack(_REPEATED, REPEATED, int(plane[0]))
        return
    write = frames.matches if bits < _REPEATING or (search and _repeats(plane, bits, frames)) else frames.entropy
    if write == frames.matches or bits < 8 * PAYS:
        frame = write(plane)
        if len(frame) < len(plane) * PAYS:
            sink.pack(_FRAME, FRAME, len(frame))
            sink.write(frame)
            return
    sink.pack(_FORM, RAW)
    sink.aligned(len(plane))[:] = plane


def decode(source: Source, size: int) -> Bytes:
    """The plane of `size` bytes that comes next.

    Raises:
        CorruptCheckpointError: there is none.
    """
    (form,) = source.unpack(_FORM)
    if form == RAW:
        return source.aligned(size)
    if form == REPEATED:
        return np.broadcast_to(np.uint8(source.read(1)[0]), size)
    if form == FRAME:
        return read_frame(source, size)
    raise CorruptCheckpointError(f"a plane of the unknown form {form}")


def is_zero(plane: Bytes) -> bool:
    """Whether it is the byte 0 repeated, as `decode` gives that."""
    return plane.strides == (0,) and not plane[0]


_SIZE = struct.Struct("<I")


def write_frame(frame: bytes, sink: Sink) -> None:
    sink.pack(_SIZE, len(frame))
    sink.write(frame)


def read_frame(source: Source, size: int) -> Bytes:
    (stored,) = source.unpack(_SIZE)
    return np.frombuffer(inflate(source.read(stored), size), np.uint8)


def _repeats(plane: Bytes, bits: float, frames: Frames) -> bool:
    """Whether looking for repetitions makes a piece out of the middle clearly smaller than Huffman codes would."""
    middle = max(0, (len(plane) - _TRIAL) // 2)
    piece = plane[middle : middle + _TRIAL]
    return len(frames.matches(piece)) < 0.9 * len(piece) * bits / 8
