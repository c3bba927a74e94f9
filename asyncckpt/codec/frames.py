"""zstd: two ways to write a frame, and one to read it that believes nothing the frame says of itself."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from asyncckpt.errors import CorruptCheckpointError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_P = zstd.CompressionParameter
_LITERALS = 1002
"""ZSTD_c_literalCompressionMode, which the binding has no name for: 1 means that literals are always Huffman coded."""

_ENTROPY: dict[int, int] = {
    _P.strategy: zstd.Strategy.fast,
    _P.target_length: 131072,
    _P.hash_log: 6,
    _P.min_match: 7,
    _P.window_log: 15,
    _LITERALS: 1,
}
"""The longest steps and the smallest table: next to no search, so Huffman coding only, with a new table every 32 KiB.

Found by experiment on exponents: 1.0 GB/s and 0.328, where level 1 has 0.3 GB/s and 0.362, level 3 0.16 and 0.409.
"""

_MATCHES: dict[int, int] = {_P.compression_level: 1, _P.window_log: 20}
_READ: dict[int, int] = {zstd.DecompressionParameter.window_log_max: 20}


_LARGE = 30 << 20


class Frames:
    """Compressors that are used again and again; for one thread at a time."""

    def __init__(self) -> None:
        # A frame comes as a new object each time. glibc maps such sizes afresh, and gives them back when freed, until
        # it has seen a larger one freed (mallopt(3), "dynamic mmap threshold"); without this, decoding takes twice as
        # long, all of it in page faults. The memory is never touched.
        np.empty(_LARGE, np.uint8)
        self._entropy = zstd.ZstdCompressor(options=_ENTROPY)
        self._matches = zstd.ZstdCompressor(options=_MATCHES)

    def entropy(self, data: Any) -> bytes:
        """A frame for symbols that are unlikely to repeat in the same order."""
        return self._entropy.compress(data, zstd.ZstdCompressor.FLUSH_FRAME)

    def matches(self, data: Any) -> bytes:
        """A frame for what repeats."""
        return self._matches.compress(data, zstd.ZstdCompressor.FLUSH_FRAME)


def inflate(frame: memoryview, size: int) -> bytes:
    """The `size` bytes of exactly one frame.

    The size that it declares is checked before anything is decompressed, the window that it asks for is bounded, and
    so is the output.

    Raises:
        CorruptCheckpointError: it is no frame, or not of this size.
    """
    try:
        declared = zstd.get_frame_info(frame).decompressed_size
        if declared != size:
            raise CorruptCheckpointError(f"a zstd frame of {declared} bytes where {size} are stored")
        decompressor = zstd.ZstdDecompressor(options=_READ)
        data = decompressor.decompress(frame, size)
    except zstd.ZstdError as error:
        raise CorruptCheckpointError(f"not a zstd frame: {error}") from error
    if not decompressor.eof or decompressor.unused_data or len(data) != size:
        raise CorruptCheckpointError(f"a zstd frame that does not end after its {size} bytes")
    return data
