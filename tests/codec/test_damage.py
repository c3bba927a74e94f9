"""A stream that is not what was written gives `CorruptCheckpointError` or wrong bytes (which the digest finds): never

another error, and never memory that its size does not explain.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.numbers import text, weights

from asyncckpt.codec import Coder, Run
from asyncckpt.codec.coder import UNIT
from asyncckpt.codec.frames import zstd
from asyncckpt.errors import CorruptCheckpointError

HEAD = struct.Struct("<BBBBBI")
"""The version, and the head of the first unit."""
WORDS, HALVES, SINGLES = range(3)
RAW, REPEATED, FRAME = range(3)

_steady = np.random.default_rng(0).normal(0, 1, 16_000).astype(np.float16).view(np.uint8)
_base = weights("F32", 3000)
_changed = (_base.view(np.uint32) + np.random.default_rng(0).integers(0, 300, 3000).astype(np.uint32)).view(np.uint8)

STREAMS: dict[str, tuple[Any, str, Any]] = {
    "nibbles": (weights("BF16", 6016), "BF16", None),
    "bytes of exponents": (_steady, "F16", None),
    "singles": (weights("F32", 8000), "F32", None),
    "planes": (weights("I64", 1500), "I64", None),
    "repetitions": (text(9000), "U8", None),
    "one byte repeated": (np.zeros(9000, np.uint8), "F32", None),
    "differences": (_changed, "F32", _base),
}


def stream(name: str) -> tuple[str, bytes, int, Any]:
    chunk, dtype, base = STREAMS[name]
    codec, stored = Coder().encode(chunk, [Run(len(chunk), dtype)], base)
    assert codec == ("zstd" if base is None else "delta")
    return codec, bytes(stored), len(chunk), base


def outcome(coder: Coder, codec: str, stored: Any, size: int, base: Any = None) -> str:
    """Any error but `CorruptCheckpointError` passes through."""
    try:
        coder.decode(codec, stored, bytearray(size), base)
    except CorruptCheckpointError:
        return "corrupt"
    return "decoded"


@pytest.mark.parametrize("name", STREAMS)
def test_every_byte_changed(name: str) -> None:
    codec, stored, size, base = stream(name)
    coder, seen = Coder(), set()
    bits = np.random.default_rng(0).integers(0, 8, len(stored))
    body = next(n for n in range(len(stored)) if outcome(coder, codec, stored[:n], size, base) == "decoded")
    for at in range(len(stored)):
        for bit in range(8) if at < 64 else (int(bits[at]),):
            damaged = bytearray(stored)
            damaged[at] ^= 1 << bit
            found = outcome(coder, codec, damaged, size, base)
            seen.add(found)
            assert found == "corrupt" or at < body, "damaged padding must show"
    assert "corrupt" in seen


@pytest.mark.parametrize("name", STREAMS)
def test_every_truncation(name: str) -> None:
    codec, stored, size, base = stream(name)
    coder = Coder()
    ends = [outcome(coder, codec, stored[:length], size, base) for length in range(len(stored))]
    body = ends.index("decoded")
    assert body >= len(stored.rstrip(b"\0"))
    assert set(ends[body:]) == {"decoded"}, "only padding is missing"
    for more in (b"\1", bytes(4096)):
        assert outcome(coder, codec, stored + more, size, base) == "corrupt"
    for other in (0, 1, size - 1, size + 1, 2 * size):
        matching = None if base is None else np.resize(base, other)
        assert outcome(coder, codec, stored, other, matching) == "corrupt"


@given(st.sampled_from(sorted(STREAMS)), st.data())
def test_spans_overwritten(name: str, data: st.DataObject) -> None:
    codec, stored, size, base = stream(name)
    damaged = bytearray(stored)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(stored.rstrip(b"\0"))))
        damaged[at : at + 1] = data.draw(st.binary(max_size=9))
    outcome(Coder(), codec, damaged, size, base)


@given(st.binary(max_size=300), st.integers(0, 20_000), st.booleans())
def test_anything_at_all(stored: bytes, size: int, versioned: bool) -> None:
    for codec in ("raw", "zstd", "delta", "lz4"):
        outcome(Coder(), codec, b"\1" * versioned + stored, size, bytes(size))


def test_the_wrong_codec_or_base() -> None:
    _, stored, size, _ = stream("differences")
    assert outcome(Coder(), "zstd", stored, size) == "corrupt"
    with pytest.raises(ValueError, match="base of 7 bytes"):
        Coder().decode("delta", stored, bytearray(size), bytes(7))
    with pytest.raises(CorruptCheckpointError, match="'lz77'"):
        Coder().decode("lz77", stored, bytearray(size))


@contextmanager
def growth(most: int) -> Iterator[None]:
    """No more than `most` bytes of memory are taken at any instant of the block."""

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    yield
    grown = status("VmHWM") - before
    assert grown <= most, f"{grown} bytes"


def _frame(data: bytes, **options: Any) -> bytes:
    return zstd.compress(data, options={getattr(zstd.CompressionParameter, k): v for k, v in options.items()} or None)


def _silent(size: int, window: int) -> bytes:
    """A frame that does not say how large it becomes."""
    compressor = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: window})
    parts = [compressor.compress(bytes(1 << 20)) for _ in range(size >> 20)]
    return b"".join([*parts, compressor.flush()])


def _lying(declared: int, size: int) -> bytes:
    """A frame of `size` bytes that declares other ones."""
    frame = bytearray(_frame(bytes(size)))
    assert frame[4] >> 6 == 2, "a size of four bytes"
    at = 5 if frame[4] & 0x20 else 6
    frame[at : at + 4] = struct.pack("<I", declared)
    return bytes(frame)


def unit(kind: int, size: int, body: bytes, *, width: int = 1, rotation: int = 0) -> bytes:
    return HEAD.pack(1, kind, width, rotation, 0, size) + body


def plane(frame: bytes) -> bytes:
    return struct.pack("<BI", FRAME, len(frame)) + frame


def nibbles(count: int, exceptions: int, body: bytes) -> bytes:
    noise = bytes(-HEAD.size % 64) + bytes(count)
    return unit(HALVES, 2 * count, noise + struct.pack("<BBI", 1, 100, exceptions) + body)


BOMBS: dict[str, Callable[[], bytes]] = {
    "frame that declares much": lambda: unit(WORDS, UNIT, plane(_frame(bytes(256 << 20)))),
    "frame that declares nothing": lambda: unit(WORDS, UNIT, plane(_silent(256 << 20, 20))),
    "frame with a huge window": lambda: unit(WORDS, UNIT, plane(_silent(1 << 20, 30))),
    "frame that declares less than it holds": lambda: unit(WORDS, UNIT, plane(_lying(UNIT, 256 << 20))),
    "frame that declares more than it holds": lambda: unit(WORDS, UNIT, plane(_lying(UNIT, 1 << 20))),
    "two frames": lambda: unit(WORDS, UNIT, plane(_frame(bytes(UNIT)) * 2)),
    "frame that is skipped": lambda: unit(WORDS, UNIT, plane(struct.pack("<II", 0x184D2A50, 0xFFFFFFF0))),
    "unit larger than units are": lambda: unit(WORDS, 8 << 20, bytes([REPEATED, 0])),
    "unit of 4 GiB": lambda: unit(WORDS, 0xFFFFFFFF, bytes([REPEATED, 0])),
    "unit of no byte": lambda: unit(WORDS, 0, bytes([REPEATED, 0])),
    "unit of half a word": lambda: unit(WORDS, 12, bytes([REPEATED, 0] * 8), width=8),
    "words of 3 bytes": lambda: unit(WORDS, 12, bytes([REPEATED, 0] * 3), width=3),
    "rotation by more than a word": lambda: unit(WORDS, 4096, bytes([REPEATED, 0]), rotation=8),
    "units of one byte": lambda: b"\1" + (struct.pack("<BBBBI", WORDS, 1, 0, 0, 1) + bytes([REPEATED, 0])) * 100_000,
    "halves of no grain": lambda: unit(HALVES, 66, bytes(4096)),
    "unknown field": lambda: unit(HALVES, 128, bytes(4096), width=2),
    "more exceptions than values": lambda: nibbles(4096, 0xFFFFFFFF, bytes(4096)),
    "exceptions outside": lambda: nibbles(
        128, 1, struct.pack("<HB", 65535, 1) + struct.pack("<I", len(_frame(bytes(64)))) + _frame(bytes(64))
    ),
    "plane of an unknown form": lambda: unit(WORDS, 4096, b"\x09" + bytes(4096)),
    "noise that is not there": lambda: unit(HALVES, UNIT, bytes(100)),
    "unknown version": lambda: b"\2" + bytes(4096),
}


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_before_it_takes_memory(name: str) -> None:
    stored, target, coder = BOMBS[name](), bytearray(8 << 20), Coder()
    with growth(4 * UNIT), pytest.raises(CorruptCheckpointError):
        coder.decode("zstd", stored, target)
