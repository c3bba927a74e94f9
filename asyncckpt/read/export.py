"""One part of a checkpoint as a safetensors file of its own, floating tensors cast: verified, in bounded memory."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from asyncckpt.errors import (
    CheckpointError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    StorageError,
)
from asyncckpt.format.image import ITEM_SIZE, MAX_DIMENSIONS, Entry, Image, Spec, layout
from asyncckpt.read.cast import CASTABLE, cast
from asyncckpt.read.contents import MALFORMED, NAMES
from asyncckpt.read.reader import THREADS, CheckpointReader

if TYPE_CHECKING:
    from asyncckpt.format.tree import Node

DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
"""What floating tensors can be cast to, by the names that users give."""

_CODES = {name: code for code, name in NAMES.items()}
_ARRAYS = {"b1": "BOOL", "i1": "I8", "u1": "U8"} | {
    f"{kind}{width}": f"{name}{8 * width}" for kind, name in (("i", "I"), ("u", "U"), ("f", "F")) for width in (2, 4, 8)
}
"""numpy dtypes, without their byte order, that safetensors knows; the others stay the bytes that they are stored as."""

METADATA = {"format": "pt"}
"""What readers of other libraries look for."""

_MOST = 100
"""So many times the size of the image, and no more, the tensors of a part may take that are stored once and tied."""

_BATCH = 64 << 20
"""Bytes of tensors that are read together where they can't be read chunk by chunk."""

_BLOCK = 1 << 20
"""Bytes that are cast at once: what lies between the two dtypes then fits a cache."""


@dataclass(frozen=True)
class Exported:
    """A tensor of the new file: `spec` says what it is there, the rest where it comes from in the image of the part.

    `code` is the dtype of the bytes that begin at `offset`; `strides`, in items, where they are not row by row.
    """

    spec: Spec
    entry: Entry
    code: str
    offset: int
    strides: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Of the items in the image, where they lie row by row."""
        return self.spec.nbytes // ITEM_SIZE[self.spec.dtype] * ITEM_SIZE[self.code]


def export(
    reader: CheckpointReader,
    part: str,
    target: Path,
    dtype: str | None = None,
    *,
    overwrite: bool = False,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> list[Exported]:
    """Write the tensors of `part` to the file `target`, floating ones as `dtype`: "bf16", "fp16" or "fp32".

    Each has the name of its path in the part, joined by dots; tensors that are tied or share memory are written each on
    its own. Other values than tensors have no place in such a file. It appears whole and durable, or not at all.
    Of what several ranks saved, tensors are put together; of what each rank had of its own it is that of rank 0.
    `on_bytes` is called with the bytes that were read meanwhile, from several threads.

    Raises:
        CheckpointNotFoundError: no such part, or it holds no tensors.
        CheckpointExistsError: the file is there already, and `overwrite` is not given.
        CorruptCheckpointError: a byte is not what was committed. Nothing was written.
        CheckpointError: a tensor that safetensors has no dtype for shares its memory with others.
        StorageError: the file can't be written.
    """
    found = contents(reader, part, None if dtype is None else DTYPES[dtype])
    if not found:
        raise CheckpointNotFoundError(f"step {reader.step}, part {part!r} holds no tensors")
    image = layout([item.spec for item in found], METADATA)
    with new_file(target, image.size, overwrite) as file:
        write_at(file, 0, memoryview(image.header))
        Copy(reader, part, file, image, found).run(on_bytes)
    return found


def contents(reader: CheckpointReader, part: str, to: str | None) -> list[Exported]:
    """The tensors of `part` as they are to be exported, floating ones as the dtype `to`.

    Raises:
        CorruptCheckpointError: its tree and its image contradict each other.
        CheckpointError: a tensor that safetensors has no dtype for shares its memory with others.
    """
    entries = reader.entries(part)
    found: dict[str, Exported] = {}
    owned: set[str] = set()
    try:
        for path, node in _tensors(reader.tree(part)):
            entry = entries[node["n"]]
            name = entry.name if entry.name not in owned and "o" not in node else _unused(".".join(path), found)
            owned.add(entry.name)
            found[name] = _exported(name, node, entry, to)
    except MALFORMED as error:
        if isinstance(error, CheckpointError):
            raise
        message = f"step {reader.step}, part {part!r}: a leaf tree outside the grammar: {error!r}"
        raise CorruptCheckpointError(message, step=reader.step, part=part) from error
    if sum(item.nbytes for item in found.values()) > _MOST * sum(share.size for share in reader.shares(part)):
        raise CheckpointError(
            f"step {reader.step}, part {part!r}: it names the same bytes more than {_MOST} times over"
        )
    return list(found.values())


def _unused(name: str, taken: dict[str, Exported]) -> str:
    found, n = name or "value", 2
    while found in taken or found == "__metadata__":
        found, n = f"{name}#{n}", n + 1
    return found


def _tensors(tree: Node) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """The nodes of tensors and arrays, in order, each with its path."""
    pending: list[tuple[tuple[str, ...], Node]] = [((), tree)]
    while pending:
        path, node = pending.pop()
        tag = node.get("$") if isinstance(node, dict) else None
        if tag in ("tensor", "ndarray"):
            yield path, node
            continue
        inside: list[tuple[Any, Node]] = []
        if isinstance(node, list):
            inside = list(enumerate(node))
        elif isinstance(node, dict) and tag is None:
            inside = list(node.items())
        elif tag == "module":
            pending.append((path, node["v"]))
        elif tag in ("tuple", "set", "frozenset", "deque"):
            inside = list(enumerate(node["v"]))
        elif tag in ("dict", "odict", "counter", "defaultdict"):
            inside = [(key, item) for key, item in node["v"]]
        pending += [((*path, str(key)), item) for key, item in reversed(inside)]


def _exported(name: str, node: dict[str, Any], entry: Entry, to: str | None) -> Exported:
    if node["$"] == "ndarray":
        return _array(name, node, entry)
    if "o" in node:
        return _view(name, node, entry, to)
    target = _becomes(entry.dtype, to)
    return Exported(Spec(name, target, entry.shape, ITEM_SIZE[target]), entry, entry.dtype, entry.offset)


def _becomes(code: str, to: str | None) -> str:
    return to if to is not None and code in CASTABLE else code


def _array(name: str, node: dict[str, Any], entry: Entry) -> Exported:
    """An array, which is never cast; one that safetensors has no dtype for stays the bytes that it is stored as."""
    dtype, shape = str(node["d"]), _sizes(node["s"])
    code = _ARRAYS.get(dtype[1:]) if dtype[:1] in "<|" else None
    if code is None or math.prod(shape) * ITEM_SIZE[code] != entry.nbytes:
        code, shape = entry.dtype, entry.shape
    return Exported(Spec(name, code, shape, ITEM_SIZE[code]), entry, code, entry.offset)


def _view(name: str, node: dict[str, Any], entry: Entry, to: str | None) -> Exported:
    """A tensor that shares the memory of the entry with others."""
    code, shape, strides, (offset,) = _CODES.get(node["d"]), _sizes(node["s"]), _sizes(node["st"]), _sizes([node["o"]])
    if code is None:
        raise CheckpointError(
            f"{name} is a {node['d']} tensor in memory that it shares with others: safetensors has no such dtype. "
            "Load the checkpoint instead."
        )
    reach = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if all(shape) else 0
    if offset + reach * ITEM_SIZE[code] > entry.nbytes:
        raise ValueError(f"{name} lies outside its entry")
    if math.prod(shape) > reach:
        raise CheckpointError(f"{name} has the same memory for several of its items. Load the checkpoint instead.")
    spec = Spec(name, _becomes(code, to), shape, ITEM_SIZE[_becomes(code, to)])
    return Exported(spec, entry, code, entry.offset + offset, _unlike_rows(shape, strides))


def _sizes(node: object) -> tuple[int, ...]:
    if not isinstance(node, list) or len(node) > MAX_DIMENSIONS or not all(type(n) is int and n >= 0 for n in node):
        raise ValueError("sizes that are none")
    return tuple(node)


def _unlike_rows(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...] | None:
    """The strides, or None where they are those of items that lie row by row."""
    expected = 1
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        if n != 1 and stride != expected:
            return strides
        expected *= n
    return None


class Copy:
    """The bytes on their way: chunk by chunk, on several threads, each chunk read once."""

    def __init__(self, reader: CheckpointReader, part: str, file: int, image: Image, found: list[Exported]) -> None:
        self._reader, self._part, self._file = reader, part, file
        self._chunk_size = reader.part(part).chunk_size
        self._by_chunk: dict[int, list[tuple[Exported, int]]] = {}
        self._whole: list[tuple[Exported, int]] = []
        for item, place in zip(found, image.entries, strict=True):
            width = ITEM_SIZE[item.code]
            several = reader.manifest.world > 1 or item.strides is not None
            if several or self._chunk_size % width or item.offset % width:
                self._whole.append((item, place.offset))
            elif item.nbytes:
                end = -(-(item.offset + item.nbytes) // self._chunk_size)
                for index in range(item.offset // self._chunk_size, end):
                    self._by_chunk.setdefault(index, []).append((item, place.offset))

    def run(self, on_bytes: Callable[[int], None]) -> None:
        if self._by_chunk:
            with (
                self._reader.chunks(self._part) as read,
                ThreadPoolExecutor(THREADS, "asyncckpt-export") as pool,
            ):

                def copy(index: int) -> None:
                    chunk = read(index)
                    self._copy_chunk(index, chunk)
                    on_bytes(len(chunk))

                for _ in pool.map(copy, sorted(self._by_chunk)):
                    pass
        for items in _batches(self._whole):
            self._copy_whole(items)
            on_bytes(sum(item.nbytes for item, _ in items))

    def _copy_chunk(self, index: int, chunk: memoryview) -> None:
        start = index * self._chunk_size
        for item, place in self._by_chunk[index]:
            begin, end = max(item.offset, start), min(item.offset + item.nbytes, start + len(chunk))
            self._put(item, place, begin - item.offset, chunk[begin - start : end - start])

    def _copy_whole(self, items: list[tuple[Exported, int]]) -> None:
        """Tensors whose shards lie in several images, whose items lie across two chunks, or that do not lie row by row.

        They are in memory for once.
        """
        image = self._reader.image(self._part, dict.fromkeys(item.entry.name for item, _ in items))
        for item, place in items:
            width = ITEM_SIZE[item.code]
            start = image.entries[item.entry.name].offset + item.offset - item.entry.offset
            if item.strides is not None:
                strides = [s * width for s in item.strides]
                view = np.ndarray(item.spec.shape, f"V{width}", image.buffer, start, strides)
                self._put(item, place, 0, np.ascontiguousarray(view).view(np.uint8).reshape(-1).data)
            else:
                self._put(item, place, 0, image.buffer[start : start + item.nbytes])

    def _put(self, item: Exported, place: int, begin: int, data: memoryview) -> None:
        """Write the bytes of `item` from `begin` on, whole items, to the file in which it has its `place`."""
        code, becomes = item.code, item.spec.dtype
        place += begin // ITEM_SIZE[code] * ITEM_SIZE[becomes]
        if code == becomes:
            write_at(self._file, place, data)
            return
        for start in range(0, len(data), _BLOCK):
            done = start // ITEM_SIZE[code] * ITEM_SIZE[becomes]
            write_at(self._file, place + done, cast(data[start : start + _BLOCK], code, becomes))


def _batches(items: list[tuple[Exported, int]]) -> Iterator[list[tuple[Exported, int]]]:
    """Items whose entries fit into `_BATCH` bytes together, or of which one alone does not."""
    batch: list[tuple[Exported, int]] = []
    held: dict[str, int] = {}
    for item, place in items:
        if batch and sum((held | {item.entry.name: item.entry.nbytes}).values()) > _BATCH:
            yield batch
            batch, held = [], {}
        batch.append((item, place))
        held[item.entry.name] = item.entry.nbytes
    if batch:
        yield batch


@contextmanager
def new_file(target: Path, size: int, overwrite: bool) -> Iterator[int]:
    """A file that takes the name `target` at the end of the block, durably; without `overwrite`, only if it is free."""
    exists = CheckpointExistsError(f"{target} is there already; nothing was written")
    if not overwrite and os.path.lexists(target):
        raise exists
    temporary = target.parent / f".{target.name}-{secrets.token_hex(6)}.tmp"
    try:
        file = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.truncate(file, size)
            yield file
            os.fsync(file)
            if overwrite:
                os.rename(temporary, target)
            else:
                os.link(temporary, target)
            settle(target.parent)
        except FileExistsError:
            raise exists from None
        finally:
            os.close(file)
            temporary.unlink(missing_ok=True)
    except CheckpointError:
        raise
    except OSError as error:
        raise StorageError(f"{target}: {error.strerror or error}", errno=error.errno) from error


def settle(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def write_at(file: int, offset: int, data: memoryview) -> None:
    while len(data):
        done = os.pwrite(file, data, offset)
        data, offset = data[done:], offset + done
