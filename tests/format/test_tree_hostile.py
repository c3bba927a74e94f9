"""Whatever a file holds, decoding gives a value or a documented error, and imports and calls nothing."""

import enum
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncckpt.errors import CheckpointError, CorruptCheckpointError, UnsupportedStateError
from asyncckpt.format.tree import TAG, Decoder, numpy_dtype


class Color(enum.Enum):
    RED = 1


class Mode(enum.Flag):
    READ = 1


class Word(str):
    pass


TAGS = [
    "int", "float", "complex", "str", "bytes", "bytearray", "tuple", "set", "frozenset", "deque", "dict", "odict",
    "counter", "defaultdict", "range",
        "path", "enum", "npscalar", "npdtype", "npstr", "npbytes", "tensor", "os:system", "",
]  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda item: st.lists(item, max_size=3) | st.dictionaries(st.text(max_size=3), item, max_size=3),
    max_leaves=6,
)
MEMBERS = st.one_of(
    JSON,
    st.sampled_from(
        ["", "0", "00", "00" * 8, "00" * 16, "ff" * 8, "zz", "-1", "<f4", "|O8", "<M8[0s]", "list", "PosixPath"]
    ),
    st.sampled_from(
        ["os:system", "posix:system", "antigravity:X", "enum:Enum", "enum:Flag", ":", "sys:modules.os", "builtins:type"]
    ),
    st.lists(st.lists(JSON, max_size=3), max_size=3),
)
HOSTILE = st.recursive(
    JSON | st.fixed_dictionaries({TAG: st.sampled_from(TAGS) | JSON}, optional=dict.fromkeys("vndfckm", MEMBERS)),
    lambda node: st.fixed_dictionaries(
        {TAG: st.sampled_from(TAGS), "v": st.lists(node | st.lists(node, max_size=2), max_size=3)},
        optional=dict.fromkeys("ndfck", MEMBERS),
    ),
    max_leaves=5,
)


@given(HOSTILE)
def test_a_hostile_node_gives_a_value_or_a_documented_error_and_imports_nothing(node: Any) -> None:
    imported = set(sys.modules)
    try:
        Decoder().decode(node)
    except CheckpointError:
        pass
    assert set(sys.modules) == imported


@pytest.mark.parametrize(
    "node",
    [
        {TAG: "float", "v": ""},
        {TAG: "float", "v": "00" * 16},
        {TAG: "complex", "v": "00" * 8},
        {TAG: "complex", "v": ""},
        {TAG: "int", "v": 3},
        {TAG: "int", "v": ""},
        {TAG: "str", "v": "ff"},
        {TAG: "bytes", "v": "0"},
        {TAG: "tuple"},
        {TAG: "tuple", "v": 3},
        {TAG: "set", "v": [[]]},
        {TAG: "deque", "v": [], "n": -1},
        {TAG: "deque", "v": [], "n": "1"},
        {TAG: "deque", "v": []},
        {TAG: "dict", "v": [[1]]},
        {TAG: "dict", "v": [[[], 1]]},
        {TAG: "defaultdict", "v": [], "f": "eval"},
        {TAG: "defaultdict", "v": []},
        {TAG: "range", "v": [0, 1, 0]},
        {TAG: "range", "v": [0, "1", 2]},
        {TAG: "path", "k": "Popen", "v": "x"},
        {TAG: "path", "k": "PosixPath", "v": 3},
        {TAG: "enum", "c": 3, "v": "A"},
        {TAG: "enum", "c": f"{__name__}:Color", "v": "GREEN"},
        {TAG: "enum", "c": f"{__name__}:Color", "v": []},
        {TAG: "enum", "c": f"{__name__}:Mode", "v": 1 << 20},
        {TAG: "npscalar", "d": "<f4", "v": "00"},
        {TAG: "npscalar", "d": "|O", "v": "00" * 8},
        {TAG: "npscalar", "d": "<U1", "v": "ffffffff"},
        {TAG: "npscalar", "d": "|S0", "v": ""},
        {TAG: "npdtype", "v": "O"},
        {TAG: "npdtype", "v": "object"},
        {TAG: "npdtype", "v": "f4,O"},
        {TAG: "npdtype", "v": "<M8[0s]"},
        {TAG: "npdtype", "v": ["f4"]},
        {TAG: "nonsense"},
        {TAG: []},
        {TAG: {}},
        {TAG: "tensor", "n": "w"},
    ],
)
def test_a_node_outside_the_grammar_is_corrupt(node: Any) -> None:
    for place in (node, [node], {"a": node}, {TAG: "tuple", "v": [node]}, {TAG: "dict", "v": [["k", node]]}):
        with pytest.raises(CorruptCheckpointError):
            Decoder().decode(place)


@pytest.mark.parametrize(
    "place", ["antigravity:Easter", "os:system", "subprocess:Popen", "builtins:print", f"{__name__}:Word", ""]
)
def test_an_enum_is_found_among_imported_enums_only(place: str) -> None:
    with pytest.raises(UnsupportedStateError, match="import its module"):
        Decoder().decode({TAG: "enum", "c": place, "v": "x"})
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    "wrap", [lambda node: [node], lambda node: {"a": node}, lambda node: {TAG: "tuple", "v": [node]}]
)
def test_a_tree_nested_without_end_is_corrupt(wrap: Any) -> None:
    node: Any = None
    for _ in range(50_000):
        node = wrap(node)
    with pytest.raises(CorruptCheckpointError):
        Decoder().decode(node)
    while node:
        node = node[0] if isinstance(node, list) else node.get("v") or node.get("a")


@given(st.text(max_size=12) | st.from_regex(r"\A[<>|=][biufcSUVmMO]\d{0,3}(\[\d{0,2}[a-zA-Z]{1,3}\])?\Z"))
def test_a_dtype_is_a_plain_one_or_refused(text: str) -> None:
    try:
        dtype = numpy_dtype(text)
    except (ValueError, TypeError):
        return
    assert not dtype.hasobject and dtype.fields is None and dtype.subdtype is None
    if dtype.kind in "mM" and "[" in text:  # numpy divides by the count: zero ends the process
        assert np.datetime_data(dtype)[1] > 0
