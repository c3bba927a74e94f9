"""Which tensors a checkpoint holds: their names, dtypes and shapes, as the training had them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.format.image import Entry
from asyncckpt.read.reader import CheckpointReader

if TYPE_CHECKING:
    from asyncckpt.format.tree import Node

NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "U16": "uint16", "I16": "int16", "F16": "float16", "BF16": "bfloat16", "U32": "uint32", "I32": "int32",
    "F32": "float32", "U64": "uint64", "I64": "int64", "F64": "float64",
}  # fmt: skip
"""The dtypes of an image, as torch calls them."""

MALFORMED = (RecursionError, TypeError, ValueError, LookupError, AttributeError)
"""What walking a leaf tree outside the grammar raises."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of an image. `dtype` is torch's name, or `numpy` and numpy's; `nbytes` is what it takes in the image.

    Where tensors share memory, it is the whole of it, and `dtype` and `shape` are those that it is stored with.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def tensors(reader: CheckpointReader, part: str) -> dict[str, StoredTensor]:
    """The tensors of `part`, by name, in the order of the image.

    Raises:
        CheckpointNotFoundError: no such part.
        CorruptCheckpointError: its tree, or the header of its image, is damaged.
    """
    entries = reader.entries(part)
    uses: dict[str, list[dict[str, Any]]] = {}
    try:
        for node in tensor_nodes(reader.tree(part)):
            if isinstance(node.get("n"), str):
                uses.setdefault(node["n"], []).append(node)
        return {name: _as_used(entry, uses.get(name, [])) for name, entry in entries.items()}
    except MALFORMED as error:
        if isinstance(error, CorruptCheckpointError):
            raise
        message = f"step {reader.step}, part {part!r}: a leaf tree outside the grammar: {error}"
        raise CorruptCheckpointError(message, step=reader.step, part=part) from error


def tensor_nodes(node: Node) -> Iterator[dict[str, Any]]:
    """The nodes of a leaf tree that stand for tensors and arrays."""
    pending = [node]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            if node.get("$") in ("tensor", "ndarray"):
                yield node
            pending += node.values()
        elif isinstance(node, list):
            pending += node


def _as_used(entry: Entry, uses: list[dict[str, Any]]) -> StoredTensor:
    dtype, shape = NAMES[entry.dtype], entry.shape
    if len(uses) == 1:
        use = uses[0]
        shape = tuple(int(length) for length in use.get("s", shape))
        if "d" in use:
            dtype = f"numpy {use['d']}" if use["$"] == "ndarray" else str(use["d"])
    return StoredTensor(entry.name, dtype, shape, entry.nbytes)
