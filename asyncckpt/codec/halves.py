"""Floats of 16 bits <-> a plane of noise, stored raw, and a plane of exponents, coded.

The *field* is eight bits of each word: the exponent (bits 14..7) or the high byte. numpy is slow where it picks bytes
out of words and fast where it works on whole words side by side, so bytes never travel. Words come in rows of 65536
where their number is a multiple of that, else in one. Let A be a word of the first half of a row, B the word at the
same place of its second half, and B' the same with its bytes swapped: the field of B' lies where A has its other bits.

    noise = A ^ B'                  a field is mixed with noise here: it stays noise
    pair  = A ^ (noise & others)    the field of A and, around it, that of B'; rotated, so that each is a byte

    noise      all of them, from the next multiple of 64 of the stream on
    u8         form of the pairs: 0 bytes, 1 nibbles
    bytes      a plane: the pairs
    nibbles    u8 least value, u32 k, k times u16: distance of an exception from the one before (the first: from 0),
               k times u8: its value; then u32 size of a frame, and the frame

Exponents are few: all but the exceptions lie among 16 neighbours, so they take four bits each, counted from the least.
Those of the pairs in the first half of a row are the low nibbles of the bytes in the frame, those in the second half
the high ones. That leaves half as many bytes to Huffman code, and one code for two symbols fits them better than two.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from asyncckpt.codec import planes
from asyncckpt.codec.frames import Frames
from asyncckpt.codec.stream import Array, Bytes, Scratch, Sink, Source
from asyncckpt.errors import CorruptCheckpointError

FIELDS = HIGH_BYTE, EXPONENT = 0, 1
"""The fields: how far a word is rotated to the left for the field to be its high byte."""

GRAIN = 64
"""The number of words must be a multiple of this."""

ROW = 1 << 16
"""Words in a row, where there are so many: near neighbours have like exponents."""

_OTHERS = (np.array(0x00FF, np.uint16), np.array(0x807F, np.uint16))
_NIBBLES, _ONE, _FOUR, _FIFTEEN, _SIXTEEN = (np.array(n, np.uint16) for n in (0x0F0F, 1, 4, 15, 16))
_BYTES_FORM, _NIBBLES_FORM = range(2)
_FORM = struct.Struct("<B")
_NIBBLES_HEAD = struct.Struct("<BBI")
_EXCEPTIONS = struct.Struct("<BI")
_LARGEST_STEP = 65535
_MOST_EXCEPTIONS = 0.02
_ONE_VALUE = 0.8
"""A share above which one value repeats so often that Huffman codes, of one bit or more, are too long for it."""


@dataclass(frozen=True)
class Advice:
    """What a sample says: the field to code, and the bits that a word will take."""

    field: int
    bits: float


def advise(words: Array) -> Advice | None:
    """From some words; None where the other bits than the field are no noise, so that they should be looked at too."""
    noise = planes.entropy(planes.histogram(words & 0x7F))
    if noise < 7 * planes.PAYS:
        return None
    high = planes.entropy(planes.histogram(words >> 8))
    exponent = planes.entropy(planes.histogram((words >> 7) & 0xFF))
    return Advice(EXPONENT if exponent < high - 0.02 else HIGH_BYTE, 8 + min(high, exponent))


def encode(words: Array, field: int, sink: Sink, frames: Frames, scratch: Scratch) -> None:
    """Code `words`; see `GRAIN`."""
    count = len(words)
    rows = words.reshape(-1, 2, _half(count))
    first, second = rows[:, 0], rows[:, 1]
    pairs = scratch.array("pairs", np.uint16, count // 2)
    noise = sink.aligned(count).view(np.uint16).reshape(first.shape)
    pair = pairs.reshape(first.shape)
    np.copyto(pair.view(">u2"), second)
    np.bitwise_xor(first, pair, out=noise)
    np.bitwise_and(noise, _OTHERS[field], out=pair)
    np.bitwise_xor(first, pair, out=pair)
    if field == EXPONENT:
        _rotate(pairs, _ONE, _FIFTEEN, scratch)
    if not _encode_nibbles(pairs, sink, frames, scratch):
        sink.pack(_FORM, _BYTES_FORM)
        planes.encode(pairs.view(np.uint8), sink, frames, search=False)


def decode(source: Source, field: int, words: Array, scratch: Scratch) -> None:
    """Fill `words`.

    Raises:
        CorruptCheckpointError: the stream is not one of `encode` for so many words.
    """
    count = len(words)
    noise = source.aligned(count).view(np.uint16)
    (form,) = source.unpack(_FORM)
    pairs = scratch.array("pairs", np.uint16, count // 2)
    if form == _NIBBLES_FORM:
        _decode_nibbles(source, pairs)
    elif form == _BYTES_FORM:
        np.copyto(pairs.view(np.uint8), planes.decode(source, count))
    else:
        raise CorruptCheckpointError(f"exponents of the unknown form {form}")
    if field == EXPONENT:
        _rotate(pairs, _FIFTEEN, _ONE, scratch)
    rows = words.reshape(-1, 2, _half(count))
    first, second = rows[:, 0], rows[:, 1]
    noise, pair = noise.reshape(first.shape), pairs.reshape(first.shape)
    mixed = scratch.array("mixed", np.uint16, count // 2).reshape(first.shape)
    np.bitwise_and(noise, _OTHERS[field], out=mixed)
    np.bitwise_xor(pair, mixed, out=first)
    np.bitwise_xor(first, noise, out=mixed)
    np.copyto(second.view(">u2"), mixed)


def _half(count: int) -> int:
    return ROW // 2 if count % ROW == 0 else count // 2


def _rotate(words: Array, left: Array, right: Array, scratch: Scratch) -> None:
    """Rotate to the left in place, `left` + `right` being 16."""
    shifted = scratch.array("mixed", np.uint16, len(words))
    np.left_shift(words, left, out=shifted)
    np.right_shift(words, right, out=words)
    np.bitwise_or(words, shifted, out=words)


def _encode_nibbles(pairs: Array, sink: Sink, frames: Frames, scratch: Scratch) -> bool:
    """Whether it could be done; `pairs` are as they were where not, and spent where they were coded."""
    values = pairs.view(np.uint8)
    counts = planes.histogram(planes.sample(values))
    sums = np.cumsum(counts)
    within = sums[15:] - sums[:-15] + counts[:-15]
    fullest = np.flatnonzero(within == within.max())
    least = int(fullest[len(fullest) // 2])
    if within[least] < (1 - _MOST_EXCEPTIONS) * counts.sum() or counts.max() > _ONE_VALUE * counts.sum():
        return False
    np.subtract(values, np.uint8(least), out=values)
    outside = scratch.array("outside", np.bool_, len(values))
    np.greater(values, np.uint8(15), out=outside)
    outside[_LARGEST_STEP::_LARGEST_STEP] = True
    where = _positions(outside)
    if len(where) > 2 * _MOST_EXCEPTIONS * len(values):
        np.add(values, np.uint8(least), out=values)
        return False
    exceptions = values[where] + np.uint8(least)
    values[where] = int(counts.argmax()) - least
    sink.pack(_NIBBLES_HEAD, _NIBBLES_FORM, least, len(where))
    sink.write(np.diff(where, prepend=0).astype(np.uint16))
    sink.write(exceptions)
    halves = pairs.reshape(-1, 2, _half(2 * len(pairs)) // 2)
    nibbles = scratch.array("nibbles", np.uint16, len(pairs) // 2).reshape(halves[:, 0].shape)
    np.multiply(halves[:, 1], _SIXTEEN, out=nibbles)
    np.bitwise_or(nibbles, halves[:, 0], out=nibbles)
    planes.write_frame(frames.entropy(nibbles.reshape(-1).view(np.uint8)), sink)
    return True


def _decode_nibbles(source: Source, pairs: Array) -> None:
    least, exceptions = source.unpack(_EXCEPTIONS)
    if exceptions > 2 * len(pairs):
        raise CorruptCheckpointError("more exceptions than there are values")
    where = np.cumsum(source.array(np.uint16, exceptions), dtype=np.int64)
    values = source.array(np.uint8, exceptions)
    nibbles = planes.read_frame(source, len(pairs)).view(np.uint16)
    halves = pairs.reshape(-1, 2, _half(2 * len(pairs)) // 2)
    nibbles = nibbles.reshape(halves[:, 0].shape)
    np.bitwise_and(nibbles, _NIBBLES, out=halves[:, 0])
    np.right_shift(nibbles, _FOUR, out=halves[:, 1])
    np.bitwise_and(halves[:, 1], _NIBBLES, out=halves[:, 1])
    flat = pairs.view(np.uint8)
    np.add(flat, np.uint8(least), out=flat)
    if exceptions:
        if where[-1] >= len(flat):
            raise CorruptCheckpointError("an exception outside its plane")
        flat[where] = values


def _positions(flags: Bytes) -> Array:
    """`np.flatnonzero(flags)` for flags of which few are set; their number is a multiple of 64."""
    folds = flags.view(np.uint64).reshape(8, -1)
    columns = np.flatnonzero(np.bitwise_or.reduce(folds, axis=0) != 0)
    row, place = np.divmod(np.flatnonzero(np.take(folds, columns, axis=1).view(np.bool_)), 8 * max(1, len(columns)))
    found: Array = row * (len(flags) // 8) + columns[place >> 3] * 8 + (place & 7)
    return found
