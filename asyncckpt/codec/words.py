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


def unsigned(data: Bytes, width: int) -> Array:
    return data.view(_UNSIGNED[width])


def encode(words: Array, sink: Sink, frames: Frames, scratch: Scratch, *, search: bool) -> None:
    """Code the planes of `words`. `search`: repetitions are likely, as they are among integers."""
    plane = scratch.array("plane", np.uint8, len(words))
    shifted = scratch.array("shifted", words.dtype, len(words))
    for shift in reversed(range(0, 8 * words.itemsize, 8)):
        np.copyto(
            plane, np.right_shift(words, words.dtype.type(shift), out=shifted) if shift else words, casting="unsafe"
        )
        planes.encode(plane, sink, frames, search=search)


def decode(source: Source, words: Array, scratch: Scratch) -> None:
    """Fill `words`.

    Raises:
        CorruptCheckpointError: the stream is not one of `encode` for so many words.
    """
    widened = scratch.array("shifted", words.dtype, len(words))
    np.copyto(words, planes.decode(source, len(words)))
    for _ in range(words.itemsize - 1):
        np.left_shift(words, words.dtype.type(8), out=words)
        np.copyto(widened, planes.decode(source, len(words)))
        np.bitwise_or(words, widened, out=words)


def rotate(words: Array, left: int, out: Array) -> None:
    """Rotate to the left by 1 or more bits, fewer than a word has; `out` may be `words`."""
    right = np.right_shift(words, words.dtype.type(8 * words.itemsize - left))
    np.left_shift(words, words.dtype.type(left), out=out)
    np.bitwise_or(out, right, out=out)


def subtract(words: Array, base: Array, out: Array) -> None:
    """The zigzagged difference of `words` from `base`."""
    np.subtract(words, base, out=out)
    signed = _SIGNED[words.itemsize]
    signs = np.right_shift(out.view(signed), signed(8 * words.itemsize - 1)).view(words.dtype)
    np.left_shift(out, words.dtype.type(1), out=out)
    np.bitwise_xor(out, signs, out=out)


def add(words: Array, base: Array) -> None:
    """Undo `subtract`, in place."""
    signs = np.bitwise_and(words, words.dtype.type(1))
    np.negative(signs, out=signs)
    np.right_shift(words, words.dtype.type(1), out=words)
    np.bitwise_xor(words, signs, out=words)
    np.add(words, base, out=words)
