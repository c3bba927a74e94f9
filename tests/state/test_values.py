"""Python and numpy values come back exactly, or are refused by their path before anything is written."""

import collections
import enum
import pathlib
import random
import struct

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.torch_states import difference, files, round_trip, run
from torch.optim import SGD

import asyncckpt


class Phase(enum.Enum):
    WARM = 1
    MAIN = "main"


class Level(enum.IntEnum):
    LOW = 1


class Bits(enum.Flag):
    A = 1
    B = 2


PAYLOAD = struct.unpack("d", b"\x01\x02\x03\x04\x05\x06\xf8\x7f")[0]
"""A NaN like no other."""
PLAIN = {
    "none": None,
    "flags": [True, False],
    "ints": [0, -1, 2**63 - 1, -(2**63), 2**63, -(2**200)],
    "floats": [0.1, -0.0, 5e-324, float("inf"), float("-inf"), PAYLOAD],
    "complex": [1j, complex(-0.0, float("nan"))],
    "text": ["", "ä\u20ac\U0001f600", "\ud800 alone", "a.b/c\n\0"],
    "bytes": [b"", bytes(range(256)), bytearray(b"\0x")],
    "tuple": (1, (2, ()), []),
    "keys": {1: "a", None: "b", (1, "x"): "c", 2.5: "d", b"k": "e", Phase.MAIN: "f", "$": "g"},
    "looks tagged": {"$": "tensor", "n": "nothing"},
    "ordered": collections.OrderedDict([("b", 1), ("a", 2)]),
    "counter": collections.Counter("aab"),
    "default": collections.defaultdict(list, {"a": [1]}),
    "deque": collections.deque([1, 2], maxlen=3),
    "sets": [{1, "a"}, frozenset({(1, 2)}), set()],
    "enums": [Phase.WARM, Phase.MAIN, Level.LOW, Bits.A | Bits.B],
    "paths": [pathlib.Path("/a/b"), pathlib.PurePosixPath("c"), pathlib.PureWindowsPath("C:\\d")],
    "range": range(3, 10, 2),
    "torch": [torch.float32, torch.bfloat16, torch.device("cpu"), torch.device("cuda", 1), torch.Size([2, 3])],
    "numpy scalars": [np.float32(0.1), np.float64(0.1), np.int8(-3), np.bool_(True), np.complex64(1j)],
    "numpy times": [np.datetime64("2026-01-02T03:04"), np.timedelta64(5, "s"), np.datetime64("NaT")],
    "numpy text": [np.str_("ä"), np.bytes_(b"b\0c")],
    "numpy dtypes": [np.dtype("float32"), np.dtype(">i4"), np.dtype("U7")],
}  # fmt: skip


def test_plain_values_come_back_as_themselves(tmp_path):
    assert difference(PLAIN, round_trip(tmp_path, PLAIN)) is None


@pytest.mark.parametrize("value", [None, 3, "text", [1, 2], (), torch.ones(2), np.ones(2), Phase.MAIN], ids=repr)
def test_a_part_may_be_any_value(value, tmp_path):
    assert difference(value, round_trip(tmp_path, value)) is None


def test_numpy_arrays_of_every_plain_dtype(tmp_path):
    codes = [order + code for order in "<>" for code in np.typecodes["All"] if code not in "OVSUc?Mm"]
    data = bytes(range(256))
    state = {code: np.frombuffer(data, code, 256 // np.dtype(code).itemsize) for code in codes}
    state |= {
        "bool": np.array([True, False]),
        "text": np.array(["a", "bcd", ""]),
        "bytes": np.array([b"a", b"bc\0d"]),
        "days": np.array(["2026-01-01", "NaT"], "M8[D]"),
        "spans": np.array([1, 2], ">m8[25s]"),
        "raw": np.array([b"ab", b"cd"]).view("V2"),
        "0-d": np.array(2.5),
        "0-d text": np.array("x"),
        "empty": np.empty((0, 3)),
        "empty text": np.empty((2, 0), "U3"),
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "strided": np.arange(20)[::-3],
        "expanded": np.broadcast_to(np.arange(3), (2, 3)),
    }
    loaded = round_trip(tmp_path, state)
    assert difference(state, loaded) is None
    assert all(array.flags.writeable for array in loaded.values())


@pytest.mark.parametrize("count", [1, 3, 5, 12, 30])
def test_bytes_of_any_size_leave_the_others_aligned(count, tmp_path):
    """Arrays and overlapping views are stored as bytes; what comes after them in the image has wider items."""
    memory = torch.arange(40, dtype=torch.uint8)
    state = {
        "array": np.arange(count, dtype=np.int8),
        "views": [memory[: count + 2], memory[1 : count + 3]],
        "wide": [torch.tensor(0.5), torch.tensor(3), torch.tensor(1j), torch.ones(3, dtype=torch.bfloat16)],
    }
    assert difference(state, round_trip(tmp_path, state, overlap=False)) is None


def test_random_states(tmp_path):
    state = {
        "rng": asyncckpt.RngState(),
        "python": random.Random(3).getstate(),
        "legacy": np.random.RandomState(3).get_state(legacy=False),
        "pcg": np.random.default_rng(3).bit_generator.state,
        "philox": np.random.Generator(np.random.Philox(3)).bit_generator.state,
        "torch": torch.Generator().manual_seed(3).get_state(),
    }
    expected = dict(state, rng=state["rng"].state_dict())
    assert difference(expected, round_trip(tmp_path, state)) is None


def a_function():
    pass


def local_enum():
    return enum.Enum("Local", "A").A


itself = {}
itself["again"] = [itself]
REFUSED = {
    "object": (object(), ""),
    "function": (a_function, ""),
    "lambda": (lambda: None, ""),
    "class": (Phase, ""),
    "module": (random, ""),
    "generator": (np.random.default_rng(0), ""),
    "torch generator": (torch.Generator(), ""),
    "random": (random.Random(0), ""),
    "namedtuple": (collections.namedtuple("P", "x")(1), ""),
    "subclass": (type("MyDict", (dict,), {})(a=1), ""),
    "default with a lambda": (collections.defaultdict(lambda: 0), ""),
    "local enum": (local_enum(), ""),
    "objects": (np.array([None, 1], object), ""),
    "structured": (np.zeros(2, [("a", "i4"), ("b", "f8")]), ""),
    "record scalar": (np.zeros(2, [("a", "i4")])[0], ""),
    "masked": (np.ma.array([1, 2], mask=[0, 1]), ""),
    "iterator": (iter([1]), ""),
    "deep inside": ({"a": [1, ({2: object()},)]}, "['a'][1][0][2]"),
    "set of objects": ({a_function}, "[0]"),
    "optimizer group": (SGD([{"params": [torch.zeros(1)], "f": print}], 0.1), "['param_groups'][0]['f']"),
    "class with a state": (torch.nn.Linear, ""),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_only_pickle_could_store_is_refused_by_its_path(kind, tmp_path):
    value, path = REFUSED[kind]
    with run(tmp_path) as ckpt:
        before = files(tmp_path)
        with pytest.raises(asyncckpt.UnsupportedStateError) as refused:
            ckpt.save(0, {"good": torch.ones(3), "part": {"x": value}})
        assert refused.value.path == "part['x']" + path
        assert refused.value.path in str(refused.value)
        assert files(tmp_path) == before
        with pytest.raises(asyncckpt.UnsupportedStateError):
            ckpt.prepare({"part": {"x": value}})
        ckpt.save(0, {"good": torch.ones(3)}).result(10)


def test_a_state_that_contains_itself_is_refused(tmp_path):
    with run(tmp_path) as ckpt, pytest.raises(asyncckpt.UnsupportedStateError, match="contain itself"):
        ckpt.save(0, {"part": itself})
    assert asyncckpt.open(tmp_path).steps() == []


@pytest.mark.parametrize(
    "state", [{}, {"": 1}, {3: 1}, {"a/b": 1}, {"..": 1}, {"A": 1, "a": 2}, {"x" * 65: 1}, {"x\n": 1}], ids=repr
)
def test_parts_must_have_names_that_files_can_have(state, tmp_path):
    with run(tmp_path) as ckpt, pytest.raises(asyncckpt.UnsupportedStateError):
        ckpt.save(0, state)
    assert asyncckpt.open(tmp_path).steps() == []


class Loader:
    """A data loader as users write them: a position, and a nested object with a state."""

    def __init__(self):
        self.epoch, self.position, self.order = 0, 0, torch.randperm(10)

    def state_dict(self):
        return {"epoch": self.epoch, "position": self.position, "order": self.order}

    def load_state_dict(self, state):
        self.epoch, self.position, self.order = state["epoch"], state["position"], state["order"]


def test_objects_with_a_state_are_asked_for_it_wherever_they_are(tmp_path):
    live = {"loaders": [Loader(), {"inner": Loader()}]}
    live["loaders"][0].position = 7
    expected = {"loaders": [live["loaders"][0].state_dict(), {"inner": live["loaders"][1]["inner"].state_dict()}]}
    assert difference(expected, round_trip(tmp_path, live)) is None
    other = {"loaders": [Loader(), {"inner": Loader()}]}
    first = other["loaders"][0]
    assert asyncckpt.restore(tmp_path, {"part": other}) == 0
    assert other["loaders"][0] is first
    assert first.position == 7
    assert difference(first.order, live["loaders"][0].order) is None


def test_names_that_collide_once_joined_are_kept_apart(tmp_path):
    names = ["a.b", "a.b#2", 1, "1", None, "None", "__metadata__", "\ud800", "\\ud800", "", "#2"]
    state = {"a": {"b": torch.ones(99)}, **{name: torch.full((i,), i) for i, name in enumerate(names)}}
    assert difference(state, round_trip(tmp_path, state)) is None


DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint16]


@st.composite
def tensors(draw):
    """Views of all kinds: of memory of their own, or of one shared by all tensors of the example."""
    dtype = draw(st.sampled_from(DTYPES))
    memory = draw(st.sampled_from([torch.arange(512, dtype=torch.uint8), POOL]))
    raw = memory & 1 if dtype == torch.bool else memory
    items = raw.view(dtype)
    start = draw(st.integers(0, 40))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    strides = draw(st.lists(st.integers(0, 4), min_size=len(shape), max_size=len(shape)))
    return items.as_strided(shape, strides, start)


POOL = torch.arange(512, dtype=torch.uint8)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.complex_numbers(), st.text(), st.binary(max_size=9),
    st.sampled_from([torch.float16, torch.device("cpu"), Phase.MAIN, Bits.A | Bits.B, pathlib.Path("x")]),
)  # fmt: skip
keys = st.one_of(st.text(max_size=4), st.integers(), st.none(), st.tuples(st.integers(), st.text(max_size=2)))
arrays = hnp.arrays(
    st.one_of(hnp.scalar_dtypes(), hnp.unicode_string_dtypes(max_len=3)), hnp.array_shapes(min_dims=0, max_side=3)
)
states = st.recursive(
    st.one_of(scalars, tensors(), arrays),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
        st.dictionaries(keys, inner, max_size=3).map(collections.OrderedDict),
    ),
    max_leaves=12,
)


@given(state=states)
@settings(max_examples=100)
def test_any_nested_state(state, tmp_path_factory):
    with run(tmp_path_factory.getbasetemp() / "nested", keep=asyncckpt.Keep(last=1), overlap=True) as ckpt:
        ckpt.save(0, {"part": state}, overwrite=True).result(10)
    assert difference(state, asyncckpt.load(tmp_path_factory.getbasetemp() / "nested")["part"]) is None
