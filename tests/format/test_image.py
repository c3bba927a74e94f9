import json
import struct
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.checkpoints import CODES, image_of

from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.format import image as im

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
SPECS = st.lists(
    st.builds(
        lambda name, dtype, shape, more: im.Spec(name, dtype, tuple(shape), more or im.ITEM_SIZE[dtype]),
        NAMES,
        st.sampled_from(sorted(im.ITEM_SIZE)),
        st.lists(st.integers(0, 9), max_size=4),
        st.none(),
    )
    | st.builds(lambda name, n: im.Spec(name, "U8", (16 * n,), 16), NAMES, st.integers(0, 9)),  # a complex128
    unique_by=lambda spec: spec.name,
    max_size=12,
)
ARRAYS = st.dictionaries(
    NAMES,
    st.sampled_from(sorted(CODES)).flatmap(lambda d: hnp.arrays(d, hnp.array_shapes(min_dims=0, min_side=0))),
    max_size=6,
)


@given(SPECS)
def test_the_header_gives_the_layout_back(specs: list[im.Spec]) -> None:
    image = im.layout(specs)
    assert im.header_size(image.header[:8], image.size) == len(image.header)
    assert im.parse_header(image.header, image.size) == {entry.name: entry for entry in image.entries}
    assert [(e.name, e.dtype, e.shape, e.nbytes) for e in image.entries] == [
        (s.name, s.dtype, s.shape, s.nbytes) for s in specs
    ]


@given(SPECS)
def test_data_starts_at_a_page_and_everything_is_aligned(specs: list[im.Spec]) -> None:
    image = im.layout(specs)
    assert len(image.header) % im.PAGE == 0
    for spec, entry in zip(specs, image.entries, strict=True):
        assert entry.offset % spec.align == 0
        assert spec.nbytes % 64 or entry.offset % 64 == 0


@given(SPECS)
def test_there_are_no_holes(specs: list[im.Spec]) -> None:
    image = im.layout(specs)
    position = len(image.header)
    for entry in sorted(image.entries, key=lambda e: (e.offset, e.nbytes)):
        assert entry.offset == position
        position += entry.nbytes
    assert position == image.size


@given(ARRAYS)
def test_the_reference_reader_sees_the_same_arrays(arrays: dict[str, np.ndarray[Any, Any]]) -> None:
    _, data = image_of(arrays)
    read = safetensors.numpy.load(data)
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (read[name].dtype, read[name].shape, read[name].tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_safe_open_reads_the_file(tmp_path: Path) -> None:
    arrays = {"a": np.arange(5, dtype=np.float64), "ü/b": np.ones((2, 3), np.uint8), "c": np.zeros((0, 4), np.int16)}
    path = tmp_path / "model.safetensors"
    path.write_bytes(image_of(arrays)[1])
    with safetensors.safe_open(path, "numpy") as file:
        assert sorted(file.keys()) == sorted(arrays)
        for name, array in arrays.items():
            assert file.get_tensor(name).tobytes() == array.tobytes()


@given(ARRAYS)
def test_files_of_the_reference_writer_are_read(arrays: dict[str, np.ndarray[Any, Any]]) -> None:
    data = safetensors.numpy.save(arrays, metadata={"made": "elsewhere"})
    entries = im.parse_header(data[: im.header_size(data, len(data))], len(data))
    assert entries.keys() == arrays.keys()
    for name, entry in entries.items():
        assert data[entry.offset : entry.offset + entry.nbytes] == arrays[name].tobytes()


def header(table: Any) -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text


def item(start: int, end: int, shape: list[Any] | None = None, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("table", "size"),
    [
        ({"a": item(0, 8), "b": item(4, 12)}, 12),
        ({"a": item(0, 8), "b": item(0, 8)}, 8),
        ({"a": item(0, 8), "b": item(9, 12)}, 12),
        ({"a": item(1, 8)}, 8),
        ({"a": item(0, 8)}, 9),
        ({"a": item(0, 8)}, 7),
        ({"a": item(0, 8, [9])}, 8),
        ({"a": item(0, 8, [-8])}, 8),
        ({"a": item(0, 8, [-2, -4])}, 8),
        ({"a": item(0, -8, [-8])}, 0),
        ({"a": item(-8, 0)}, 0),
        ({"a": item(0, 0, [2**32, 2**32])}, 0),
        ({"a": item(0, 0, [2**62, 4])}, 0),
        ({"a": item(0, 2**64, [2**64])}, 8),
        ({"a": item(0, 8, [8.5])}, 8),
        ({"a": item(0, 8, ["8"])}, 8),
        ({"a": item(0, 8, [8], "Q7")}, 8),
        ({"a": item(0, 8, [8], "")}, 8),
        ({"a": {"dtype": "U8", "shape": [8]}}, 8),
        ({"a": {"dtype": "U8", "shape": [8], "data_offsets": [0]}}, 8),
        ({"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8, 8]}}, 8),
        ({"a": 3}, 0),
        ([], 0),
        (b"", 0),
        (b"{", 0),
        (b'{"a":\xff}', 0),
        (b'{"\xff":1}', 0),
        (b"[" * 100_000, 0),
        (b'{"a":' * 100_000, 0),
        (b'{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}} x', 8),
        (b'{"a":{"dtype":"U8","shape":[' + b"1," * 2000 + b'8],"data_offsets":[0,8]}}', 8),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(table: Any, size: int) -> None:
    data = header(table)
    with pytest.raises(CorruptCheckpointError):
        im.parse_header(data, len(data) + size)


@pytest.mark.parametrize(
    ("first", "size"),
    [
        (b"", 0),
        (b"\0" * 7, 7),
        (struct.pack("<Q", 1), 8),
        (b"\xff" * 8, 2**63),
        (struct.pack("<Q", im.MAX_HEADER + 1), 2**40),
    ],
)
def test_an_impossible_length_is_refused(first: bytes, size: int) -> None:
    with pytest.raises(CorruptCheckpointError):
        im.header_size(first, size)


@given(SPECS, st.data())
def test_a_changed_header_is_refused_or_still_without_holes(specs: list[im.Spec], data: st.DataObject) -> None:
    image = im.layout(specs)
    changed = bytearray(image.header)
    text = len(image.header.rstrip(b" "))
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(8, text - 1))] = data.draw(st.integers(32, 127))
    try:
        entries = im.parse_header(bytes(changed), image.size)
    except CorruptCheckpointError:
        return
    assert sum(e.nbytes for e in entries.values()) == image.size - len(image.header)


@given(
    st.recursive(
        st.none() | st.integers() | st.text() | st.floats(), lambda s: st.lists(s) | st.dictionaries(st.text(), s)
    )
)
def test_any_other_json_is_refused_cleanly(value: Any) -> None:
    data = header(msgspec.json.encode(value))
    try:
        assert im.parse_header(data, len(data)) == {}
    except CorruptCheckpointError:
        pass


def test_more_names_than_a_header_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(im, "MAX_HEADER", 5000)
    with pytest.raises(ValueError, match="safetensors allows"):
        im.layout([im.Spec(f"{i:0100}", "U8", (1,), 1) for i in range(50)])
