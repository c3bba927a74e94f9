"""Verified bytes to Python objects. Tensors lie in the memory that was read, each with a storage of its own size."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from asyncckpt.format.image import MAX_DIMENSIONS, Entry
from asyncckpt.format.tree import TAG, Decoder, numpy_dtype
from asyncckpt.read.reader import CheckpointReader, PartImage
from asyncckpt.snapshot import dtypes

_ALIGN = 64
"""What torch's own allocations give; some matrix kernels round differently on other addresses."""

_MAX_ITEMS = 1 << 58
"""Items of the largest tensor whose size in bytes (of 16 an item) still fits 63 bits."""


def rebuild_part(reader: CheckpointReader, part: str) -> Any:
    """The value of `part`: tensors on the CPU, everything else as it was saved.

    Raises:
        CorruptCheckpointError: some byte is not what was committed.
    """
    return Rebuilder(reader.image(part)).decode(reader.tree(part))


def rebuild_tensors(reader: CheckpointReader, part: str, keys: list[str]) -> dict[str, Any]:
    """Single tensors of `part`, by their paths joined by dots; only the chunks that hold them are read.

    Raises:
        CheckpointNotFoundError: no such part or tensor.
        CorruptCheckpointError: some byte is not what was committed.
    """
    known = _named_nodes(Outline().decode(reader.tree(part)))
    nodes = {key: known.get(key, {TAG: "tensor", "n": key}) for key in keys}
    rebuilder = Rebuilder(reader.image(part, dict.fromkeys(node["n"] for node in nodes.values())))
    return {key: rebuilder.decode(node) for key, node in nodes.items()}


@dataclass(frozen=True)
class _Stored:
    """Stands for a tensor or an array whose bytes are in the image."""

    node: dict[str, Any] = field(hash=False)


class Outline(Decoder):
    """Nodes to values without the image."""

    def other(self, tag: str, node: dict[str, Any]) -> Any:
        if tag in ("tensor", "ndarray"):
            return _Stored(node | {"n": str(node["n"])})
        if tag == "module":
            return {name: self._value(item, 1) for name, item in node["v"].items()}
        return None

    def _enum(self, node: dict[str, Any], depth: int) -> Any:
        return None


def _named_nodes(outline: Any) -> dict[str, dict[str, Any]]:
    """The nodes of tensors by name. What an entry of the image is called goes before a path that reads the same."""
    named: dict[str, dict[str, Any]] = {}
    entries: dict[str, dict[str, Any]] = {}

    def walk(value: Any, path: tuple[str, ...]) -> None:
        if isinstance(value, _Stored):
            named.setdefault(".".join(path), value.node)
            if "o" not in value.node:
                entries.setdefault(value.node["n"], value.node)
        elif isinstance(value, dict):
            for key, item in value.items():
                walk(item, (*path, str(key)))
        elif isinstance(value, list | tuple):
            for i, item in enumerate(value):
                walk(item, (*path, str(i)))

    walk(outline, ())
    return named | entries


class Rebuilder(Decoder):
    """Nodes to values, tensors and arrays out of `image`. What was one tensor at the save is one tensor again."""

    def __init__(self, image: PartImage) -> None:
        self._image = image
        self._plain: dict[str, torch.Tensor] = {}
        self._made: dict[str, Any] = {}
        self._copied: set[str] = set()

    def other(self, tag: str, node: dict[str, Any]) -> Any:
        if tag in ("tensor", "ndarray"):
            return self._once(node, self._tensor if tag == "tensor" else self._array)
        if tag == "module":
            state = OrderedDict((name, self._value(item, 1)) for name, item in node["v"].items())
            if node["m"] is not None:
                metadata = self._value(node["m"], 1)
                _check(isinstance(metadata, dict) and all(isinstance(key, str) for key in metadata), "bad metadata")
                state._metadata = OrderedDict(metadata)  # type: ignore[attr-defined]
            return state
        if tag == "dtype":
            return dtypes.BY_NAME[node["v"]]
        if tag == "device":
            return _device(node["v"])
        if tag == "size":
            return torch.Size(_shape(node["v"]))
        return super().other(tag, node)

    def _once(self, node: dict[str, Any], make: Callable[[dict[str, Any]], Any]) -> Any:
        key = repr(sorted(node.items()))
        made = self._made.get(key)
        if made is None:
            made = self._made[key] = make(node)
        return made

    def _copying(self, entry: Entry) -> None:
        """Hold memory to the size of the image: a save makes each entry of one tensor or array, never of several."""
        _check(entry.name not in self._copied, "two tensors or arrays that are copies of one entry")
        self._copied.add(entry.name)

    def _tensor(self, node: dict[str, Any]) -> torch.Tensor:
        entry = self._entry(node["n"])
        stored = self._stored(entry)
        dtype = _dtype(node["d"]) if "d" in node else stored.dtype
        shape = _shape(node.get("s", list(entry.shape)))
        strides = _sizes(node["st"]) if "st" in node else None
        if "o" in node:
            _check(strides is not None, "a view without strides")
            return self._view(stored, dtype, shape, strides or [], node["o"])
        if dtype is not stored.dtype:
            _check(math.prod(shape) * dtype.itemsize == entry.nbytes, "a dtype that does not fit its bytes")
            stored = stored.view(torch.uint8).reshape(-1).view(dtype).view(shape)
        if strides is None:
            return stored
        _check(list(shape) == list(entry.shape) or dtype is not dtypes.BY_CODE[entry.dtype], "another shape")
        _check(_reach(shape, strides) == math.prod(shape), "strides that are not a permutation")
        self._copying(entry)
        made = torch.empty_strided(shape, strides, dtype=dtype)
        dtypes.as_plain(made).copy_(dtypes.as_plain(stored))
        return made

    def _view(
        self, stored: torch.Tensor, dtype: torch.dtype, shape: list[int], strides: list[int], offset: int
    ) -> torch.Tensor:
        storage = stored.untyped_storage()
        width = dtype.itemsize
        start = stored.storage_offset() * stored.dtype.itemsize + offset
        _check(
            type(offset) is int
            and offset >= 0
            and start % width == 0
            and start + _reach(shape, strides) * width <= storage.nbytes(),
            "a view outside its entry",
        )
        return torch.empty(0, dtype=dtype).set_(storage, start // width, shape, strides)

    def _stored(self, entry: Entry) -> torch.Tensor:
        """The entry, under its dtype of the header; one tensor however often it is asked for."""
        found = self._plain.get(entry.name)
        if found is None:
            dtype = dtypes.BY_CODE[entry.dtype]
            if entry.nbytes == 0:
                found = torch.empty(_shape(list(entry.shape)), dtype=dtype)
            else:
                window = self._image.buffer[entry.offset : entry.offset + entry.nbytes]
                flat = torch.frombuffer(window, dtype=torch.uint8)
                if flat.data_ptr() % _ALIGN:
                    flat = flat.clone()
                found = flat.view(dtype).view(entry.shape)
            self._plain[entry.name] = found
        return found

    def _array(self, node: dict[str, Any]) -> np.ndarray[Any, Any]:
        entry = self._entry(node["n"])
        dtype, shape = numpy_dtype(node["d"]), _shape(node["s"])
        _check(math.prod(shape) * dtype.itemsize == entry.nbytes, "a dtype that does not fit its bytes")
        if entry.nbytes == 0:
            return np.ndarray(shape, dtype, b"") if dtype.itemsize == 0 else np.empty(shape, dtype)
        self._copying(entry)
        data = bytearray(self._image.buffer[entry.offset : entry.offset + entry.nbytes])
        return np.frombuffer(data, dtype).reshape(shape)

    def _entry(self, name: str) -> Entry:
        entry = self._image.entries.get(name)
        if entry is None:
            raise ValueError(f"the tree names a tensor {name!r} that the image does not have")
        return entry


def _sizes(node: object) -> list[int]:
    """Sizes or strides that torch and numpy can take; the product of others may be text, or take hours."""
    if not isinstance(node, list) or len(node) > MAX_DIMENSIONS:
        raise ValueError("sizes that are not a list, or a long one")
    _check(all(type(n) is int and 0 <= n < _MAX_ITEMS for n in node), "sizes out of bounds")
    return node


def _shape(node: object) -> list[int]:
    shape = _sizes(node)
    _check(math.prod(max(n, 1) for n in shape) < _MAX_ITEMS, "a shape of more items than there can be")
    return shape


def _dtype(name: str) -> torch.dtype:
    dtype = dtypes.BY_NAME[name]
    _check(dtype not in dtypes.QUANTIZED, "a dtype whose scales are not stored")
    return dtype


def _device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(str(error)) from None


def _reach(shape: list[int], strides: list[int]) -> int:
    """Items from the first to the last, of a view."""
    if len(shape) != len(strides):
        raise ValueError("as many strides as dimensions")
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)
