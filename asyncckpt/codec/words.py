"""Words of 1, 2, 4 or 8 bytes <-> their byte planes, the highest first, each coded by itself.

Before they are taken apart, words may be rotated (the exponent of a float then fills whole bytes), or replaced by
their difference from the words of a base: the difference of the bit patterns as integers, zigzagged, so that small
changes of either sign have leading zeros. (XOR would turn the carry of a small change into many set bits.)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from asyncckpt.codec import planes
from asyncckpt.codec.frames import Frames
from asyncckpt.codec.stream import Array, Bytes, Scratch, Sink, Source

_UNSIGNED: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_SIGNED: dict[int, Any] = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}


WIDTHS = tuple(_UNSIGNED)
_BLOCK = 1 << 15
"""Words that are worked on at a time where they are passed over several times: they stay in the caches of a core."""


def unsigned(data: Bytes, width: int) -> Array:
    return data.view(_UNSIGNED[width])


def encode(words: Array, sink: Sink, frames: Frames, scratch: Scratch, *, search: bool) -> None:
    """Code the planes of `words`. `search`: repetitions are likely, as they are among integers."""
    plane = scratch.array("plane", np.uint8, len(words))
    for place in reversed(bytes_of(words)):
        np.copyto(plane, place)
        planes.encode(plane, sink, frames, search=search)


def decode(source: Source, words: Array) -> None:
    """Fill `words`.

    Raises:
        CorruptCheckpointError: the stream is not one of `encode` for so many words.
    """
    *higher, lowest = [planes.decode(source, len(words)) for _ in range(words.itemsize)]
    np.copyto(words, lowest)  # and zeros in the other bytes
    for place, plane in zip(bytes_of(words)[1:], reversed(higher), strict=True):
        if not planes.is_zero(plane):
            np.copyto(place, plane)


def bytes_of(words: Array) -> list[Bytes]:
    """The bytes of all words, by their place, the lowest first."""
    return list(words.view(np.uint8).reshape(len(words), -1).T)


def rotate(words: Array, left: int, out: Array) -> None:
    """Rotate to the left by 1 or more bits, fewer than a word has; `out` may be `words`."""
    right = np.right_shift(words, words.dtype.type(8 * words.itemsize - left))
    np.left_shift(words, words.dtype.type(left), out=out)
    np.bitwise_or(out, right, out=out)


def subtract(words: Array, base: Array, out: Array, scratch: Scratch) -> None:
    """The zigzagged difference of `words` from `base`."""
    one, signed = words.dtype.type(1), _SIGNED[words.itemsize]
    for start in range(0, len(words), _BLOCK):
        some, other = words[start : start + _BLOCK], base[start : start + _BLOCK]
        change = out[start : start + _BLOCK]
        signs = scratch.array("signs", signed, len(some))
        np.subtract(some, other, out=change)
        np.right_shift(change.view(signed), signed(8 * words.itemsize - 1), out=signs)
        np.left_shift(change, one, out=change)
        np.bitwise_xor(change, signs.view(words.dtype), out=change)


def add(words: Array, base: Array, scratch: Scratch) -> None:
    """Undo `subtract`, in place."""
    one = words.dtype.type(1)
    for start in range(0, len(words), _BLOCK):
        some, other = words[start : start + _BLOCK], base[start : start + _BLOCK]
        signs = scratch.array("signs", words.dtype, len(some))
        np.bitwise_and(some, one, out=signs)
        np.negative(signs, out=signs)
        np.right_shift(some, one, out=some)
        np.bitwise_xor(some, signs, out=some)
        np.add(some, other, out=some)
