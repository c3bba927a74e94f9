"""The compressors that are compared, each on one thread: bytes of chunks to bytes, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

CHUNK = 8 << 20
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Contender:
    """`encode(chunk, base)` gives what `decode(stored, target, base)` makes the chunk of again, in `target`.

    Those that know no base are given the chunk XOR the base, and undo that themselves; it is in their time.
    """

    encode: Callable[[Array, Array | None], Any]
    decode: Callable[[Any, Array, Array | None], None]


def ours(dtype: str) -> Contender:
    from asyncckpt.codec import Coder, Run

    coder = Coder()

    def encode(chunk: Array, base: Array | None) -> tuple[str, bytes]:
        codec, stored = coder.encode(chunk, [Run(len(chunk), dtype)], base)
        return codec, stored

    def decode(stored: tuple[str, Any], target: Array, base: Array | None) -> None:
        coder.decode(stored[0], stored[1], target, base)

    return Contender(encode, decode)


def plain(compress: Callable[[Array], bytes], decompress: Callable[[bytes], Any]) -> Contender:
    def encode(chunk: Array, base: Array | None) -> bytes:
        return compress(chunk if base is None else xor(chunk, base))

    def decode(stored: bytes, target: Array, base: Array | None) -> None:
        data = np.frombuffer(decompress(stored), np.uint8)
        if base is None:
            target[:] = data
        else:
            xor(data, base, target)

    return Contender(encode, decode)


def xor(one: Array, two: Array, out: Array | None = None) -> Array:
    into = None if out is None else out.view(np.uint64)
    return np.bitwise_xor(one.view(np.uint64), two.view(np.uint64), out=into).view(np.uint8)


def zipnn(dtype: str) -> Contender:
    from zipnn import ZipNN

    coder = ZipNN(input_format="byte", bytearray_dtype={"BF16": "bfloat16", "F32": "float32"}[dtype], threads=1)
    # It takes the bytes apart in the buffer that it is given, so it gets a copy.
    return plain(lambda chunk: coder.compress(bytearray(chunk)), lambda stored: coder.decompress(stored))


def blosc(dtype: str, codec: str, shuffle: str, level: int) -> Contender:
    import blosc2

    width = {"BF16": 2, "F32": 4}[dtype]
    options: dict[str, Any] = {
        "codec": getattr(blosc2.Codec, codec),
        "clevel": level,
        "typesize": width,
        "nthreads": 1,
        "filters": [getattr(blosc2.Filter, shuffle)],
        "filters_meta": [0],
    }
    return plain(lambda chunk: blosc2.compress2(chunk, **options), lambda s: blosc2.decompress2(s, nthreads=1))


def zstd(level: int) -> Contender:
    from asyncckpt.codec.frames import zstd as module

    return plain(lambda chunk: module.compress(chunk, level), module.decompress)


def lz4() -> Contender:
    import lz4.block

    return plain(lambda chunk: lz4.block.compress(chunk), lambda stored: lz4.block.decompress(stored))


CONTENDERS: dict[str, Callable[[str], Contender]] = {
    "asyncckpt": ours,
    "ZipNN": zipnn,
    "blosc2 shuffle+zstd": lambda dtype: blosc(dtype, "ZSTD", "SHUFFLE", 1),
    "blosc2 bitshuffle+lz4": lambda dtype: blosc(dtype, "LZ4", "BITSHUFFLE", 5),
    "zstd -1": lambda dtype: zstd(1),
    "lz4": lambda dtype: lz4(),
}
