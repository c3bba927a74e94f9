"""The leaf tree: everything of a part that is not tensor bytes, as JSON, exact and without pickle.

null, booleans, text, 64-bit integers, finite floats, lists and dicts with text keys stand for themselves. All else
is an object with the member "$" that names its type:

    int, float, complex, str (with lone surrogates), bytes, bytearray      "v": hex digits (floats: their 8 bytes)
    tuple, set, frozenset, deque ("n": maxlen)                             "v": [item, ...]
    dict, odict, counter, defaultdict ("f": factory)                       "v": [[key, value], ...]
    range "v": [start, stop, step]      path "k": class, "v": text         enum "c": module:class, "v": name or value
    npscalar "d": numpy dtype, "v": hex digits                             npdtype "v": numpy dtype
    npstr "v": text            npbytes "v": hex digits
    tensor, ndarray, dtype, device, size: see `asyncckpt.snapshot.flatten`

Enum classes are looked up among modules already imported; nothing is ever imported or called by name.
"""

from __future__ import annotations

import enum
import math
import pathlib
import re
import struct
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import numpy as np

from asyncckpt.errors import CheckpointError, CorruptCheckpointError, UnsupportedStateError

TAG = "$"
MAX_DEPTH = 100
"""Levels of nesting; far enough below the interpreter's limit that it is this one that is met, reading included."""

Node = Any
"""What JSON can hold: None, bool, int, float, str, list, dict with str keys (or msgspec.Raw of one)."""

Path = tuple[Any, ...]
"""Keys from the root of the state to a value."""

_FACTORIES: dict[str, Any] = {
    "none": None, "list": list, "dict": dict, "set": set, "int": int, "float": float, "str": str, "bool": bool,
}  # fmt: skip
_FACTORY_NAMES = {factory: name for name, factory in _FACTORIES.items()}
_PATHS = {
    kind.__name__: kind
    for kind in (pathlib.PosixPath, pathlib.WindowsPath, pathlib.PurePosixPath, pathlib.PureWindowsPath)
}
_NUMPY_DTYPE = re.compile(r"[<>|=][biufcSUVmM]\d{0,6}(\[([1-9]\d{0,5})?[a-zA-Z]{1,8}\])?")


def show(path: Path) -> str:
    """A path as the user writes it: `model['layers'][3]`."""
    if not path:
        return "the state"
    return str(path[0]) + "".join(f"[{key!r}]" for key in path[1:])


def numpy_dtype(text: object) -> np.dtype[Any]:
    """The plain numpy dtype of `text`; never one that holds objects."""
    if isinstance(text, str) and _NUMPY_DTYPE.fullmatch(text):
        return np.dtype(text)
    raise ValueError(f"not a plain numpy dtype: {text!r}")


class Encoder:
    """Python values to nodes. A subclass says in `other` what it does with values that are not plain."""

    def encode(self, value: Any, path: Path) -> Node:
        """The node of `value`.

        Raises:
            UnsupportedStateError: a value of a type that can't be stored, or nesting deeper than `MAX_DEPTH`.
        """
        kind = type(value)
        if value is None or kind is bool:
            return value
        plain = _PLAIN.get(kind)
        if plain is not None:
            return plain(value)
        if len(path) > MAX_DEPTH:
            raise UnsupportedStateError(
                f"{show(path[:4])}... is nested deeper than {MAX_DEPTH} levels; does it contain itself?",
                path=show(path),
            )
        if kind is list:
            return self._items(value, path)
        if kind is dict:
            if TAG not in value and all(map(_is_text, value)):
                return {key: self.encode(item, (*path, key)) for key, item in value.items()}
            return {TAG: "dict", "v": self._pairs(value, path)}
        container = _CONTAINERS.get(kind)
        if container is not None:
            return container(self, value, path)
        if isinstance(value, enum.Enum):
            return self._enum(value, path)
        if isinstance(value, np.generic) and kind is value.dtype.type:
            return {TAG: "npscalar", "d": self._dtype(value.dtype, path), "v": value.tobytes().hex()}
        if isinstance(value, np.dtype):
            return {TAG: "npdtype", "v": self._dtype(value, path)}
        return self.other(value, path)

    def other(self, value: Any, path: Path) -> Node:
        raise unsupported(value, path)

    def _items(self, values: Any, path: Path) -> list[Node]:
        return [self.encode(item, (*path, i)) for i, item in enumerate(values)]

    def _pairs(self, value: dict[Any, Any], path: Path) -> list[list[Node]]:
        return [[self.encode(key, (*path, key)), self.encode(item, (*path, key))] for key, item in value.items()]

    def _default(self, value: defaultdict[Any, Any], path: Path) -> Node:
        factory = _FACTORY_NAMES.get(value.default_factory)
        if factory is None:
            raise UnsupportedStateError(
                f"{show(path)} is a defaultdict whose factory is {value.default_factory!r}; only "
                f"{', '.join(_FACTORIES)} can be stored. Save dict(...) of it.",
                path=show(path),
            )
        return {TAG: "defaultdict", "f": factory, "v": self._pairs(value, path)}

    def _enum(self, value: enum.Enum, path: Path) -> Node:
        kind = type(value)
        place = f"{kind.__module__}:{kind.__qualname__}"
        if _find_enum(place) is not kind:
            raise UnsupportedStateError(
                f"{show(path)} is a member of {place}, which can't be found again by that name; "
                "define the enum at the top level of a module, or save its value.",
                path=show(path),
            )
        by_value = isinstance(value, enum.Flag)
        return {TAG: "enum", "c": place, "v": self.encode(value.value, path) if by_value else value.name}

    def _dtype(self, dtype: np.dtype[Any], path: Path) -> str:
        if not _NUMPY_DTYPE.fullmatch(dtype.str) or np.dtype(dtype.str) != dtype:
            raise UnsupportedStateError(
                f"{show(path)} has the numpy dtype {dtype}; only plain dtypes can be stored.", path=show(path)
            )
        return dtype.str


def unsupported(value: Any, path: Path) -> UnsupportedStateError:
    kind = type(value)
    return UnsupportedStateError(
        f"{show(path)} is a {kind.__module__}.{kind.__qualname__}, which can't be stored exactly without pickle. "
        "Give it state_dict() and load_state_dict(), or save plain values, tensors or arrays of it.",
        path=show(path),
    )


def _is_text(key: Any) -> bool:
    return type(key) is str and _encodable(key)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _int(value: int) -> Node:
    return value if -(1 << 63) <= value < 1 << 63 else {TAG: "int", "v": format(value, "x")}


def _float_bytes(value: float) -> str:
    return struct.pack("<d", value).hex()


def _float(value: float) -> Node:
    return value if math.isfinite(value) else {TAG: "float", "v": _float_bytes(value)}


def _str(value: str) -> Node:
    return value if _encodable(value) else {TAG: "str", "v": value.encode("utf-8", "surrogatepass").hex()}


_PLAIN: dict[type, Callable[[Any], Node]] = {
    int: _int,
    float: _float,
    str: _str,
    complex: lambda v: {TAG: "complex", "v": _float_bytes(v.real) + _float_bytes(v.imag)},
    bytes: lambda v: {TAG: "bytes", "v": v.hex()},
    bytearray: lambda v: {TAG: "bytearray", "v": v.hex()},
    np.str_: lambda v: {TAG: "npstr", "v": _str(str.__str__(v))},
    np.bytes_: lambda v: {TAG: "npbytes", "v": v.hex()},
    range: lambda v: {TAG: "range", "v": [_int(v.start), _int(v.stop), _int(v.step)]},
    **{kind: lambda v: {TAG: "path", "k": type(v).__name__, "v": _str(str(v))} for kind in _PATHS.values()},
}
_CONTAINERS: dict[type, Callable[[Encoder, Any, Path], Node]] = {
    tuple: lambda e, v, p: {TAG: "tuple", "v": e._items(v, p)},
    set: lambda e, v, p: {TAG: "set", "v": e._items(v, p)},
    frozenset: lambda e, v, p: {TAG: "frozenset", "v": e._items(v, p)},
    deque: lambda e, v, p: {TAG: "deque", "n": v.maxlen, "v": e._items(v, p)},
    OrderedDict: lambda e, v, p: {TAG: "odict", "v": e._pairs(v, p)},
    Counter: lambda e, v, p: {TAG: "counter", "v": e._pairs(v, p)},
    defaultdict: lambda e, v, p: e._default(v, p),
}


_MALFORMED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, struct.error)
"""What the standard library raises over a node outside the grammar."""


class Decoder:
    """Nodes to Python values. A subclass says in `other` what the tags of its own mean."""

    def decode(self, node: Node) -> Any:
        """The value of `node`.

        Raises:
            CorruptCheckpointError: not a node of the grammar.
            CheckpointError: an enum whose module is not imported in this process.
        """
        try:
            return self._value(node, 0)
        except (RecursionError, *_MALFORMED) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CorruptCheckpointError(f"a leaf tree outside the grammar: {type(error).__name__}: {error}") from error

    def other(self, tag: str, node: dict[str, Any]) -> Any:
        raise ValueError(f"unknown tag {tag!r}")

    def _value(self, node: Node, depth: int) -> Any:
        if depth > 2 * MAX_DEPTH:
            raise ValueError("nested too deep")
        if isinstance(node, list):
            return [self._value(item, depth + 1) for item in node]
        if not isinstance(node, dict):
            return node
        tag = node.get(TAG)
        if tag is None:
            return {key: self._value(item, depth + 1) for key, item in node.items()}
        plain = _DECODE_PLAIN.get(tag)
        if plain is not None:
            return plain(node)
        items = _DECODE_ITEMS.get(tag)
        if items is not None:
            return items([self._value(item, depth + 1) for item in node["v"]], node)
        pairs = _DECODE_PAIRS.get(tag)
        if pairs is not None:
            return pairs([(self._value(k, depth + 1), self._value(v, depth + 1)) for k, v in node["v"]], node)
        if tag == "enum":
            return self._enum(node, depth)
        return self.other(tag, node)

    def _enum(self, node: dict[str, Any], depth: int) -> enum.Enum:
        kind = _find_enum(node["c"])
        if kind is None:
            raise UnsupportedStateError(
                f"the checkpoint holds a member of the enum {node['c']}; import its module first", path=node["c"]
            )
        if issubclass(kind, enum.Flag):
            return kind(self._value(node["v"], depth + 1))
        return kind[node["v"]]


def _find_enum(place: str) -> type[enum.Enum] | None:
    """The enum class at `module:Outer.Inner`, among imported modules, by plain dictionary look-ups."""
    module, _, qualname = place.partition(":")
    found: Any = sys.modules.get(module)
    for name in qualname.split("."):
        found = None if found is None else vars(found).get(name)
        if not isinstance(found, type):
            return None
    return found if issubclass(found, enum.Enum) else None


def _from_hex_floats(text: str, count: int) -> tuple[float, ...]:
    return struct.unpack("<d" if count == 1 else "<dd", bytes.fromhex(text))


def _decode_path(node: dict[str, Any]) -> pathlib.PurePath:
    kind = _PATHS[node["k"]]
    if issubclass(kind, pathlib.Path) and not isinstance(pathlib.Path(), kind):
        kind = pathlib.PureWindowsPath if kind is pathlib.WindowsPath else pathlib.PurePosixPath
    return kind(_text(node["v"]))


def _text(node: Node) -> str:
    return node if isinstance(node, str) else _decode_str(node)


def _decode_str(node: dict[str, Any]) -> str:
    return bytes.fromhex(node["v"]).decode("utf-8", "surrogatepass")


def _decode_numpy_scalar(node: dict[str, Any]) -> Any:
    dtype, data = numpy_dtype(node["d"]), bytes.fromhex(node["v"])
    if dtype.itemsize != len(data) or dtype.kind in "SU":
        raise ValueError("a numpy scalar of the wrong size or kind")
    scalar: Any = np.frombuffer(data, dtype)[0] if data else np.zeros((), dtype)[()]
    return scalar


_DECODE_PLAIN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "int": lambda n: int(n["v"], 16),
    "float": lambda n: _from_hex_floats(n["v"], 1)[0],
    "complex": lambda n: complex(*_from_hex_floats(n["v"], 2)),
    "str": _decode_str,
    "bytes": lambda n: bytes.fromhex(n["v"]),
    "bytearray": lambda n: bytearray.fromhex(n["v"]),
    "range": lambda n: range(*(Decoder().decode(item) for item in n["v"])),
    "path": _decode_path,
    "npstr": lambda n: np.str_(_text(n["v"])),
    "npbytes": lambda n: np.bytes_(bytes.fromhex(n["v"])),
    "npscalar": _decode_numpy_scalar,
    "npdtype": lambda n: numpy_dtype(n["v"]),
}
_DECODE_ITEMS: dict[str, Callable[[list[Any], dict[str, Any]], Any]] = {
    "tuple": lambda items, n: tuple(items),
    "set": lambda items, n: set(items),
    "frozenset": lambda items, n: frozenset(items),
    "deque": lambda items, n: deque(items, n["n"]),
}
_DECODE_PAIRS: dict[str, Callable[[list[tuple[Any, Any]], dict[str, Any]], Any]] = {
    "dict": lambda pairs, n: dict(pairs),
    "odict": lambda pairs, n: OrderedDict(pairs),
    "counter": lambda pairs, n: Counter(dict(pairs)),
    "defaultdict": lambda pairs, n: defaultdict(_FACTORIES[n["f"]], pairs),
}
