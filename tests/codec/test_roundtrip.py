"""What is encoded comes back bit for bit, whatever the bytes are, and under any hint of what they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.numbers import ITEM, noise, text, weights

from asyncckpt.codec import Coder, Layout, Run
from asyncckpt.codec.coder import PAGE, UNIT
from asyncckpt.format.image import Spec, layout, parse_header

DTYPES = sorted(ITEM)
SIZES = [0, 1, 7, 63, 4096, 4097, 8192, 100_003, 128 << 10, (512 << 10) + 130, UNIT + (256 << 10) + 77]


def stored(chunk: Any, runs: list[Run], base: Any = None, coder: Coder | None = None) -> tuple[str, bytes]:
    codec, data = (coder or Coder()).encode(chunk, runs, base)
    return codec, bytes(data)


def comes_back(chunk: Any, runs: list[Run], base: Any = None) -> tuple[str, bytes]:
    """The stored form, after it was decoded by another coder, over memory that holds something else."""
    codec, data = stored(chunk, runs, base)
    out = bytearray(b"\xa5" * len(chunk))
    Coder().decode(codec, data, out, base)
    assert bytes(out) == bytes(chunk)
    assert len(data) <= len(chunk)
    assert (codec == "raw") == (len(data) == len(chunk))
    return codec, data


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_every_dtype_and_size(dtype: str, size: int) -> None:
    chunk = weights(dtype, size // ITEM[dtype] + 1)[:size]
    comes_back(chunk, [Run(size, dtype)] if size else [])
    comes_back(noise(size), [Run(size, dtype)] if size else [])
    comes_back(np.zeros(size, np.uint8), [Run(size, dtype)] if size else [])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_every_dtype_and_size_against_a_base(dtype: str, size: int) -> None:
    base = weights(dtype, size // ITEM[dtype] + 1)[:size]
    chunk = base.copy()
    chunk[::61] += 1
    comes_back(chunk, [Run(size, dtype)] if size else [], base)
    comes_back(base, [Run(size, dtype)] if size else [], base)
    comes_back(chunk, [Run(size, dtype)] if size else [], noise(size))


@st.composite
def cases(draw: st.DrawFn) -> tuple[bytes, list[Run], bytes | None]:
    """Runs of all kinds of bytes, under hints that may be wrong, cut anywhere."""
    pieces, runs = [], []
    for _ in range(draw(st.integers(1, 4))):
        dtype, size = draw(st.sampled_from(DTYPES)), draw(st.integers(1, 20_000))
        seed = draw(st.integers(0, 1 << 30))
        kind = draw(st.sampled_from(["weights", "noise", "text", "few", "same", "exact"]))
        if kind == "weights":
            piece = weights(draw(st.sampled_from(DTYPES)), size, seed)[:size]
        elif kind == "few":
            piece = noise(size, seed) % draw(st.integers(1, 40)) + draw(st.integers(0, 255))
        elif kind == "exact":
            piece = np.frombuffer(draw(st.binary(min_size=1, max_size=64)) * (size // 64 + 1), np.uint8)
        else:
            piece = {"noise": noise(size, seed), "text": text(size), "same": np.full(size, seed % 256)}[kind]
        pieces.append(piece.astype(np.uint8).tobytes())
        runs.append(Run(len(pieces[-1]), dtype))
    chunk = b"".join(pieces)
    if not draw(st.booleans()):
        return chunk, runs, None
    base = bytearray(chunk)
    for at in draw(st.lists(st.integers(0, len(base) - 1), max_size=20)):
        base[at] ^= draw(st.integers(1, 255))
    return chunk, runs, bytes(base)


@given(cases())
def test_any_bytes_under_any_hint(case: tuple[bytes, list[Run], bytes | None]) -> None:
    comes_back(*case)


@pytest.mark.parametrize("width", [2, 4])
def test_every_bit_pattern_of_a_float(width: int) -> None:
    """NaN payloads, infinities and denormals among them."""
    every = np.arange(1 << 16, dtype=np.uint16)
    items = (
        every if width == 2 else every.astype(np.uint32) << 16 | np.random.default_rng(0).integers(0, 1 << 16, 1 << 16)
    )
    likely = weights("BF16" if width == 2 else "F32", 1 << 20)
    chunk = np.concatenate([likely, items.astype(f"u{width}").view(np.uint8)])
    codec, _ = comes_back(chunk, [Run(len(chunk), "BF16" if width == 2 else "F32")])
    assert codec == "zstd"


def test_memory_that_is_not_aligned() -> None:
    for offset in (1, 2, 3):
        chunk = weights("F32", 100_000)
        moved = np.zeros(len(chunk) + offset, np.uint8)[offset:]
        moved[:] = chunk
        codec, data = comes_back(moved, [Run(len(moved), "F32")], None)
        out = np.zeros(len(chunk) + 1, np.uint8)[1:]
        held = memoryview(b"\0" + data)[1:]
        Coder().decode(codec, held, out)
        assert (out == chunk).all()


def test_a_coder_is_used_again_and_gives_the_same_bytes() -> None:
    coder = Coder()
    chunks = [(weights("BF16", 900_000), "BF16"), (weights("F32", 5_000), "F32"), (weights("F64", 90_000), "F64")]
    first = [stored(chunk, [Run(len(chunk), dtype)]) for chunk, dtype in chunks]
    for _ in range(2):
        for (chunk, dtype), expected in zip(chunks, first, strict=True):
            assert stored(chunk, [Run(len(chunk), dtype)], coder=coder) == expected
            out = bytearray(len(chunk))
            coder.decode(*expected, out)
            assert bytes(out) == chunk.tobytes()


@pytest.mark.parametrize(
    ("dtype", "most"),
    [("BF16", 0.68), ("F32", 0.845), ("F16", 0.87), ("F64", 0.93), ("I64", 0.15), ("I16", 0.6), ("U8", 0.8)],
)
def test_trained_numbers_become_smaller(dtype: str, most: float) -> None:
    chunk = weights(dtype, (4 << 20) // ITEM[dtype])
    codec, data = comes_back(chunk, [Run(len(chunk), dtype)])
    assert codec == "zstd"
    assert len(data) <= most * len(chunk)
    assert len(data) % PAGE == 0


def test_numbers_that_can_not_be_negative_cost_no_sign() -> None:
    squares = np.random.default_rng(0).normal(0, 1e-3, 1 << 20).astype(np.float32) ** 2
    signed = squares * np.random.default_rng(1).choice([-1, 1], 1 << 20)
    sizes = [len(stored(c.astype(np.float32).view(np.uint8), [Run(4 << 20, "F32")])[1]) for c in (squares, signed)]
    assert sizes[1] - sizes[0] > 0.9 * (1 << 20) / 8


def test_floats_that_were_widened_cost_little_more_than_narrow_ones() -> None:
    narrow = weights("BF16", 1 << 20)
    wide = (narrow.view(np.uint16).astype(np.uint32) << 16).view(np.uint8)
    _, small = stored(narrow, [Run(len(narrow), "BF16")])
    _, large = stored(wide, [Run(len(wide), "F32")])
    assert len(large) < 1.06 * len(small)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64", "I32", "U8"])
def test_unchanged_costs_nothing_and_small_changes_little(dtype: str) -> None:
    base = weights(dtype, (2 << 20) // ITEM[dtype])
    codec, data = comes_back(base, [Run(len(base), dtype)], base)
    assert (codec, len(data)) == ("delta", PAGE)
    chunk = base.copy()
    chunk.view(f"i{ITEM[dtype]}")[:] += (
        np.random.default_rng(0).integers(-3, 4, len(base) // ITEM[dtype]).astype(f"i{ITEM[dtype]}")
    )
    codec, data = comes_back(chunk, [Run(len(base), dtype)], base)
    assert codec == "delta"
    assert len(data) < 0.42 / ITEM[dtype] * len(chunk) + 2 * PAGE


def test_a_base_that_does_not_help_is_not_used() -> None:
    chunk = weights("F32", 1 << 18, seed=1)
    codec, data = comes_back(chunk, [Run(len(chunk), "F32")], noise(len(chunk)))
    assert codec == "zstd"
    assert len(data) <= len(stored(chunk, [Run(len(chunk), "F32")])[1])


def test_the_caller_is_told_of_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="layout of 7 bytes"):
        Coder().encode(bytes(8), [Run(7, "U8")])
    with pytest.raises(ValueError, match="base of 7 bytes"):
        Coder().encode(bytes(8), [Run(8, "U8")], bytes(7))


@given(
    st.lists(st.tuples(st.sampled_from(["F32", "BF16", "I64", "U8", "I32"]), st.integers(0, 9_000)), max_size=12),
    st.integers(1, 12),
)
def test_a_layout_covers_every_chunk(tensors: list[tuple[str, int]], pages: int) -> None:
    specs = [Spec(str(i), dtype, (count,), ITEM[dtype]) for i, (dtype, count) in enumerate(tensors)]
    image = layout(specs)
    known = Layout(len(image.header), parse_header(image.header, image.size).values())
    for start in range(0, image.size, pages * 4096):
        end = min(start + pages * 4096, image.size)
        runs = known.runs(start, end)
        assert sum(run.length for run in runs) == end - start
        assert all(run.length >= 4096 for run in runs[1:])
        ends = np.cumsum([start, *(run.length for run in runs)])
        for entry in image.entries:
            first, last = max(entry.offset, start), min(entry.offset + entry.nbytes, end)
            if last - first >= 4096:
                run = int(np.searchsorted(ends, first, "right")) - 1
                assert (runs[run].dtype, last <= ends[run + 1]) == (entry.dtype, True)
