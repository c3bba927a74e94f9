"""Formats that are pickled: files of torch.save, and directories of DCP's own FileSystemWriter. For conversions only.

This is the one module that unpickles, and only after somebody has said so (`--allow-pickle`). Nothing that a pickle
names is looked up but what stands in an allow-list: torch's own (`weights_only=True`) for tensors and values, and for
DCP's metadata the classes that it is made of.
"""

from __future__ import annotations

import collections
import ctypes
import io
import math
import mmap
import os
import pathlib
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import msgspec
import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_saver import save

from asyncckpt.errors import CorruptCheckpointError, NotSupportedError, UnsupportedStateError
from asyncckpt.format.image import Spec
from asyncckpt.format.tree import Node
from asyncckpt.format.tree import Path as TreePath
from asyncckpt.integrations.dcp import keys
from asyncckpt.integrations.dcp.shares import Values, bytes_of, paths, tensor_node
from asyncckpt.snapshot import dtypes
from asyncckpt.snapshot.plan import plan_part
from asyncckpt.write.incoming import IncomingPart

_PIECE = 8 << 20
_MAX_METADATA = 4 << 30
_DEFAULT_PART = "model"
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

# What comes in


def read_torch(path: Path, part: str | None) -> list[IncomingPart]:
    """What a file of torch.save holds: a part for each key, if they can be parts and one is a dict; else one part.

    The file stays mapped, and its tensors are read when they are written.

    Raises:
        CorruptCheckpointError: not a file of torch.save.
        NotSupportedError: it is of the old form, which can't be mapped.
        UnsupportedStateError: it holds what torch lets through only with code, or what can't be stored.
    """
    try:
        value = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refused(str(path), error) from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        if "mmap can only be used" in str(error):
            raise NotSupportedError(
                f"{path}: files of before torch 1.6 can't be mapped; load and save it once more by torch"
            ) from error
        raise CorruptCheckpointError(f"{path}: not a file of torch.save: {error}") from error
    by_part = isinstance(value, Mapping) and part is None and all(isinstance(key, str) for key in value)
    tops = [(key, "") if isinstance(item, Mapping) else (key,) for key, item in value.items()] if by_part else [("",)]
    whole = keys.whole_part(tops, part)
    if whole is None:
        return [_incoming(name, item) for name, item in value.items()]
    return [_incoming(_DEFAULT_PART if whole == keys.ROOT else whole, value)]


def _incoming(name: str, value: Any) -> IncomingPart:
    flattener = Values()
    node = flattener.encode(value, (name,))
    plan = plan_part(flattener.leaves, None)
    return IncomingPart(name, msgspec.json.encode(node), plan.specs, [_Mapped(s.data) for s in plan.sources])


class _Mapped:
    """A source: a tensor in a mapped file, whose pages go again as soon as they are written."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __call__(self) -> Iterator[memoryview]:
        data = bytes_of(self._tensor)
        own = self._tensor.is_contiguous() and self._tensor.numel()  # else it is a copy, in memory of its own
        start = self._tensor.data_ptr() if own else 0
        for at in range(0, len(data), _PIECE):
            piece = data[at : at + _PIECE]
            yield piece
            if own and hasattr(mmap, "MADV_DONTNEED"):
                first = -(-(start + at) // mmap.PAGESIZE) * mmap.PAGESIZE
                last = (start + at + len(piece)) // mmap.PAGESIZE * mmap.PAGESIZE
                if last > first:
                    _libc.madvise(first, last - first, mmap.MADV_DONTNEED)


def read_dcp(path: Path, part: str | None) -> list[IncomingPart]:
    """What a directory of DCP's FileSystemWriter holds; see `read_torch` for the parts. It holds one tensor at once.

    Raises:
        CorruptCheckpointError: files are missing, damaged, or not what the metadata says.
        NotSupportedError: it was written through extensions.
        UnsupportedStateError: it holds what is let through only with code, or what can't be stored.
    """
    about = _read_metadata(path / ".metadata")
    where = paths(about.state_dict_metadata, about.planner_data)
    whole = keys.whole_part(where.values(), part)
    whole = _DEFAULT_PART if whole == keys.ROOT else whole
    leaves: dict[str, dict[TreePath, Node]] = {}
    parts: dict[str, IncomingPart] = {}
    for key, kind in about.state_dict_metadata.items():
        name, below = keys.placed(where[key], whole)
        incoming = parts.setdefault(name, IncomingPart(name, b""))
        if isinstance(kind, TensorStorageMetadata):
            node = _add_tensor(incoming, keys.entry_name(name, below), _DcpTensor(path, key, kind, about.storage_data))
        else:
            value = _load(path, about.storage_data[MetadataIndex(key)], key)
            node = _add_value(incoming, value, (name, *below))
        leaves.setdefault(name, {})[below] = node
    keys.check_unlike((name, spec.name) for name, incoming in parts.items() for spec in incoming.specs)
    for name, inside in leaves.items():
        parts[name].tree = msgspec.json.encode(keys.compose(name, inside))
    return list(parts.values())


def _add_tensor(incoming: IncomingPart, name: str, source: _DcpTensor) -> Node:
    dtype, size = source.kind.properties.dtype, source.kind.size
    if source.kind.properties.layout != torch.strided or dtype in dtypes.QUANTIZED:
        raise UnsupportedStateError(
            f"{source.key} is a tensor of {dtype} that is more than strided bytes", path=source.key
        )
    code = dtypes.CODES.get(dtype)
    shape = tuple(size) if code else (*size, dtype.itemsize)
    incoming.specs.append(Spec(name, code or "U8", shape, dtype.itemsize))
    incoming.sources.append(source)
    return tensor_node(name, source.kind.properties, size)


def _add_value(incoming: IncomingPart, value: Any, path: TreePath) -> Node:
    flattener = Values()
    node = flattener.encode(value, path)
    plan = plan_part(flattener.leaves, None)
    incoming.specs += plan.specs
    incoming.sources += [_Held(source.data) for source in plan.sources]
    return node


class _Held:
    """A source: a tensor in memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __call__(self) -> Iterator[memoryview]:
        yield bytes_of(self._tensor)


class _DcpTensor:
    """A source: a tensor put together of the boxes that ranks have written."""

    def __init__(self, path: Path, key: str, kind: TensorStorageMetadata, places: Mapping[MetadataIndex, Any]) -> None:
        self.key, self.kind = key, kind
        self._path, self._places = path, places

    def __call__(self) -> Iterator[memoryview]:
        boxes = self.kind.chunks
        if sum(math.prod(box.sizes) for box in boxes) != math.prod(self.kind.size):
            raise CorruptCheckpointError(
                f"{self._path}: the boxes of {self.key} leave holes or overlap", tensor=self.key
            )
        if len(boxes) == 1:
            yield bytes_of(self._box(boxes[0]))
            return
        whole = torch.empty(self.kind.size, dtype=self.kind.properties.dtype)
        for box in boxes:
            target = whole
            for dimension, (at, length) in enumerate(zip(box.offsets, box.sizes, strict=True)):
                target = target.narrow(dimension, at, length)
            dtypes.as_plain(target).copy_(dtypes.as_plain(self._box(box)))
        yield bytes_of(whole)

    def _box(self, box: Any) -> torch.Tensor:
        place = self._places.get(MetadataIndex(self.key, box.offsets))
        if place is None:
            raise CorruptCheckpointError(f"{self._path}: nothing says where {self.key} lies", tensor=self.key)
        found = _load(self._path, place, self.key)
        if not isinstance(found, torch.Tensor) or found.shape != box.sizes or found.dtype != self.kind.properties.dtype:
            raise CorruptCheckpointError(f"{self._path}: {self.key} is not what the metadata says", tensor=self.key)
        return found


def _load(folder: Path, place: Any, key: str) -> Any:
    """The value at a place of DCP, as torch lets it through."""
    if getattr(place, "transform_descriptors", None):
        raise NotSupportedError(f"{folder}: {key} was written through {place.transform_descriptors}")
    name = str(place.relative_path)
    if os.path.basename(name) != name:
        raise CorruptCheckpointError(f"{folder}: {key} is to lie in {name!r}, which is not in that directory")
    try:
        with (folder / name).open("rb", buffering=0) as file:
            file.seek(place.offset)
            data = file.read(place.length)
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refused(f"{folder}: {key}", error) from error
    except (RuntimeError, OSError, EOFError, ValueError, TypeError) as error:
        raise CorruptCheckpointError(f"{folder}: {key} can't be read: {error}", tensor=key) from error


def _refused(what: str, error: Exception) -> UnsupportedStateError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UnsupportedStateError(
        f"{what} holds more than tensors and plain values, and is not read: {reason}", path=what
    )


def _get_layout(name: str) -> torch.layout:
    return {"torch.strided": torch.strided, "torch.sparse_coo": torch.sparse_coo}[name]


_ALLOWED: dict[tuple[str, str], Any] = {
    **{
        ("torch.distributed.checkpoint.metadata", name): getattr(metadata, name)
        for name in (
            "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
            "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
        )
    },
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): filesystem._StorageInfo,
    ("torch.serialization", "_get_layout"): _get_layout,
    ("torch", "Size"): torch.Size,
    ("collections", "OrderedDict"): collections.OrderedDict,
    **{(module, "PosixPath"): pathlib.PurePosixPath for module in ("pathlib", "pathlib._local")},
}  # fmt: skip


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes of DCP's metadata and torch's dtypes, and looks nothing else up."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in dtypes.BY_NAME:
            return dtypes.BY_NAME[name]
        found = _ALLOWED.get((module, name))
        if found is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of DCP's metadata")
        return found


def _read_metadata(path: Path) -> Metadata:
    try:
        with path.open("rb") as file:
            found = _MetadataUnpickler(file).load()
    except FileNotFoundError:
        raise CorruptCheckpointError(f"{path} is missing: no checkpoint of DCP was finished there") from None
    except pickle.UnpicklingError as error:
        raise _refused(str(path), error) from error
    except Exception as error:  # whatever the members of a broken pickle raise
        raise CorruptCheckpointError(f"{path}: not the metadata of DCP: {type(error).__name__}: {error}") from error
    if not isinstance(found, Metadata) or not isinstance(found.storage_data, Mapping):
        raise CorruptCheckpointError(f"{path}: not the metadata of DCP")
    return found


# What goes out


def write_torch(value: Any, file: BinaryIO, forget: Callable[[], None]) -> None:
    """Write `value` as torch.save does. `forget` is called every few MB: what was written is not needed any more."""
    torch.save(value, cast(IO[bytes], _Forgetting(file, forget)))


class _Forgetting(io.RawIOBase):
    def __init__(self, file: BinaryIO, forget: Callable[[], None]) -> None:
        self._file, self._forget, self._since = file, forget, 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._file.write(data)
        self._since += len(data)
        if self._since > _PIECE:
            self._forget()
            self._since = 0
        return len(data)

    def flush(self) -> None:
        self._file.flush()


class _ForgettingPlanner(DefaultSavePlanner):
    def __init__(self, forget: Callable[[], None]) -> None:
        super().__init__()
        self._forget = forget

    def resolve_data(self, write_item: Any) -> Any:
        self._forget()
        return super().resolve_data(write_item)


def write_dcp(state: dict[str, Any], folder: Path, forget: Callable[[], None]) -> None:
    """Write `state` to the new directory `folder` as DCP's FileSystemWriter does, every file durable."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is")
        save(
            state,
            storage_writer=filesystem.FileSystemWriter(folder, sync_files=True),
            planner=_ForgettingPlanner(forget),
            no_dist=True,
        )
