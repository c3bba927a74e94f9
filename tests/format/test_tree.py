"""The leaf tree: what comes back is of the same type and has the same bits."""

import enum
import math
import pathlib
import re
import struct
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from asyncckpt.errors import UnsupportedStateError
from asyncckpt.format.tree import MAX_DEPTH, TAG, Decoder, Encoder, show


class Color(enum.Enum):
    RED = 1
    ROUGE = 1  # noqa: PIE796
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 0
    HIGH = 10**30


class Mode(enum.Flag):
    READ = enum.auto()
    WRITE = enum.auto()


class Outer:
    class Kind(enum.StrEnum):
        A = "a"


def through(value: Any) -> Any:
    """`value`, as it comes back from a file."""
    return Decoder().decode(msgspec.json.decode(msgspec.json.encode(Encoder().encode(value, ("part",)))))


def bits(value: float) -> bytes:
    return struct.pack("<d", value)


def same(a: Any, b: Any) -> bool:
    """Equal in type and bits, all the way down, and in the same order where there is one."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.str_):
        return str.__str__(a) == str.__str__(b)
    if isinstance(a, np.bytes_):
        return bytes(a) == bytes(b)
    if isinstance(a, np.generic):
        return a.dtype == b.dtype and a.tobytes() == b.tobytes() and len(repr(a)) == len(repr(b))
    if isinstance(a, np.dtype):
        return a == b and a.str == b.str
    if type(a) is float:
        return bits(a) == bits(b)
    if type(a) is complex:
        return bits(a.real) == bits(b.real) and bits(a.imag) == bits(b.imag)
    if isinstance(a, enum.Enum):
        return a is b
    if isinstance(a, dict):
        if isinstance(a, defaultdict) and a.default_factory is not b.default_factory:
            return False
        return len(a) == len(b) and all(same(x, y) and same(a[x], b[y]) for x, y in zip(a, b, strict=True) if x == x)
    if isinstance(a, deque) and a.maxlen != b.maxlen:
        return False
    if isinstance(a, list | tuple | deque):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, set | frozenset):
        return len(a) == len(b) and all(any(same(x, y) for y in b) for x in a)
    return bool(a == b)


FLOATS = st.floats() | st.builds(lambda n: struct.unpack("<d", struct.pack("<Q", n))[0], st.integers(0, 2**64 - 1))
TEXTS = (
    st.text(st.characters()) | st.text(st.characters(categories=["Cs", "Lu"])) | st.sampled_from([TAG, "", "\0", '"'])
)
NUMPY_KINDS = (
    hnp.boolean_dtypes()
    | hnp.integer_dtypes(endianness="<")
    | hnp.unsigned_integer_dtypes(endianness="<")
    | hnp.floating_dtypes(endianness="<", sizes=(16, 32, 64))
    | hnp.complex_number_dtypes(endianness="<", sizes=(64, 128))
    | hnp.datetime64_dtypes(endianness="<")
    | hnp.timedelta64_dtypes(endianness="<")
)
DTYPES = NUMPY_KINDS | hnp.scalar_dtypes() | hnp.byte_string_dtypes() | hnp.unicode_string_dtypes()
SCALARS = (
    NUMPY_KINDS.flatmap(hnp.from_dtype)
    | st.builds(np.str_, TEXTS)
    | st.builds(np.bytes_, st.binary(max_size=5))
    | st.builds(np.void, st.binary(min_size=1, max_size=5))
)
HASHABLE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**200), 2**200),
    st.sampled_from([2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**64]),
    FLOATS,
    st.complex_numbers(),
    TEXTS,
    st.binary(max_size=8),
    st.builds(range, st.integers(), st.integers(), st.integers().filter(bool)),
    st.builds(pathlib.PurePosixPath, TEXTS),
    st.builds(pathlib.PureWindowsPath, TEXTS),
    st.builds(pathlib.Path, TEXTS),
    st.sampled_from([Color.RED, Color.ROUGE, Color.BLUE, Level.LOW, Level.HIGH, Outer.Kind.A]),
    st.sampled_from([Mode.READ, Mode.READ | Mode.WRITE, Mode(0)]),
)
KEYS = HASHABLE | st.tuples(HASHABLE, HASHABLE) | st.frozensets(st.integers(), max_size=3)
FACTORIES = st.sampled_from([None, list, dict, set, int, float, str, bool])


def containers(item: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    items, table = st.lists(item, max_size=4), st.dictionaries(KEYS, item, max_size=4)
    return st.one_of(
        items,
        items.map(tuple),
        st.builds(deque, items, st.none() | st.integers(0, 5)),
        table,
        st.dictionaries(TEXTS, item, max_size=4),
        table.map(OrderedDict),
        table.map(Counter),
        st.builds(defaultdict, FACTORIES, table),
        st.sets(KEYS, max_size=4),
        st.frozensets(KEYS, max_size=4),
    )


LEAVES = HASHABLE | st.binary(max_size=8).map(bytearray) | SCALARS | DTYPES
VALUES = st.recursive(LEAVES, containers, max_leaves=12)


@given(VALUES)
def test_what_comes_back_is_the_same_in_type_and_bits(value: Any) -> None:
    assert same(through(value), value)


NAN = struct.unpack("<d", bytes.fromhex("efcdab8967f5f4ff"))[0]


@pytest.mark.parametrize(
    "value",
    [
        NAN, -NAN, math.nan, math.inf, -math.inf, -0.0, 5e-324, sys.float_info.max, 1e22, 0.1,
        complex(-0.0, NAN), [1 << 20_000, -1 << 20_000], "\ud800", "a\udfffb", b"",
        bytearray(b"\0"), set(), frozenset(), (),
        {}, deque([1, 2], 2), deque(maxlen=0), deque(), defaultdict(None, {1: 2}), defaultdict(list, {(): []}),
        OrderedDict([("b", 1), ("a", 2)]), Counter("abca"), {TAG: "tuple", "v": []}, {TAG: {TAG: TAG}},
        {None: 1, True: 2, 0: 3}, {"1": "text", 1: "number"}, {"\ud800": 1},
        {b"k": {(1, ("a", None)): range(3)}}, range(10**30, 0, -7),
        pathlib.Path("."), [True, 1, 1.0, False, 0, -0.0],
        np.str_(""), np.str_("a\0"), np.str_("\ud800"), np.bytes_(b""), np.bytes_(b"a\0\0"), np.void(b"a\0"),
        np.bool_(True), np.float16(-0.0), np.longdouble(1) / 3, np.datetime64("NaT", "s"),
        np.datetime64(5, "25s"), np.timedelta64(3),
        np.dtype(">f4"), np.dtype("<M8[25s]"), np.dtype("U7"), np.dtype("V3"), np.dtype("S"), np.dtype(bool),
    ],
)  # fmt: skip
def test_what_is_easily_lost_is_not(value: Any) -> None:
    assert same(through(value), value)


def test_the_bits_of_a_nan_survive() -> None:
    assert bits(through(NAN)) == bits(NAN) != bits(math.nan)


class Word(str):
    pass


class Number(int):
    pass


class Table(dict):  # type: ignore[type-arg]
    pass


class NumpyNumber(np.float64):
    pass


def local_enum() -> enum.Enum:
    class Hidden(enum.Enum):
        A = 1

    return Hidden.A


@pytest.mark.parametrize(
    "value",
    [
        object(), object, len, lambda: 0, ..., NotImplemented, Word("x"), Number(1), Table(),
        NumpyNumber(1),
        iter(()), slice(3), memoryview(b""), defaultdict(lambda: 0), defaultdict(tuple), local_enum(),
        np.dtype(object), np.dtype([("a", "i4")]), np.dtype("(2,)i4"), np.zeros((), [("a", "i4")])[()],
        np.array([object()], object).dtype,
        Exception(), re.compile("x"),
    ],
)  # fmt: skip
def test_what_cannot_be_stored_exactly_is_refused_with_its_path(value: Any) -> None:
    for state, path in [({"a": [0, value]}, "model['a'][1]"), ([(value,)], "model[0][0]"), ({1: value}, "model[1]")]:
        with pytest.raises(UnsupportedStateError) as caught:
            Encoder().encode(state, ("model",))
        assert caught.value.path == path and path in str(caught.value)


def list_of(inner: Any) -> Any:
    return [inner]


NESTINGS = [
    list_of,
    lambda inner: (inner,),
    lambda inner: {"k": inner},
    lambda inner: {1: inner},
    lambda inner: deque([inner]),
    lambda inner: OrderedDict(k=inner),
    lambda inner: defaultdict(None, k=inner),
]


def below(frames: int, call: Any) -> Any:
    """What `call` gives that many frames further down."""
    return call() if frames == 0 else below(frames - 1, call)


@pytest.mark.parametrize("nest", NESTINGS)
def test_deep_nesting_is_read_again_or_refused(nest: Any) -> None:
    value: Any = 0
    for _ in range(MAX_DEPTH - 1):
        value = nest(value)
    assert below(250, lambda: same(through(value), value))
    for _ in range(20_000):
        value = nest(value)
    with pytest.raises(UnsupportedStateError, match="nested deeper"):
        below(250, lambda: Encoder().encode(value, ("model",)))
    while value:  # so that the interpreter need not take it apart by recursion
        value = next(iter(value.values() if isinstance(value, dict) else value))


@pytest.mark.parametrize(
    "empty", [list, dict, OrderedDict, deque, lambda: defaultdict(dict), lambda: defaultdict(None)]
)
def test_what_contains_itself_is_refused(empty: Any) -> None:
    value = empty()
    if isinstance(value, dict):
        value["again"] = [value]
    else:
        value.append((value,))
    with pytest.raises(UnsupportedStateError, match="contain itself"):
        Encoder().encode(value, ("model",))


@pytest.mark.parametrize(("kind", "other"), [("WindowsPath", "PureWindowsPath"), ("PosixPath", "PurePosixPath")])
def test_a_path_of_another_system_is_read_as_a_pure_one(kind: str, other: str) -> None:
    native = type(pathlib.Path()).__name__
    path = Decoder().decode({TAG: "path", "k": kind, "v": "a/b"})
    assert type(path).__name__ == (kind if kind == native else other)
    assert path.parts == ("a", "b")


def test_a_path_in_the_state_is_shown_as_it_is_written() -> None:
    assert show(("model", "layers", 3)) == "model['layers'][3]"
    assert show(()) == "the state"
