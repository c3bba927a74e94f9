"""Safetensors files of whoever wrote them: one, or several with an index, as models are published."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from asyncckpt.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError, StorageError
from asyncckpt.format.image import Entry, header_size, parse_header

INDEX = "model.safetensors.index.json"
SUFFIX = ".safetensors"
_PIECE = 8 << 20
_MAX_INDEX = 256 << 20


@dataclass(frozen=True)
class ForeignTensor:
    """A tensor in the file at `path`. It is a source: called, it gives its bytes piece by piece."""

    path: Path
    entry: Entry

    def __call__(self) -> Iterator[memoryview]:
        with _named(self.path), self.path.open("rb", buffering=0) as file:
            file.seek(self.entry.offset)
            left = self.entry.nbytes
            while left:
                data = file.read(min(left, _PIECE))
                if not data:
                    raise CorruptCheckpointError(f"{self.path}: it is shorter than its header says")
                left -= len(data)
                yield memoryview(data)


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def is_safetensors(path: Path) -> bool:
    """Whether `path` looks like what `tensors` reads."""
    return path.name.endswith((SUFFIX, f"{SUFFIX}.index.json")) or (path / INDEX).is_file() or bool(_files(path))


def tensors(path: Path) -> dict[str, ForeignTensor]:
    """The tensors of a safetensors file, of an index, or of a folder with an index or with one such file; by name.

    Raises:
        CheckpointNotFoundError: nothing of that kind is there.
        CorruptCheckpointError: a header or the index makes no sense, or they contradict each other.
        StorageError: a file can't be read.
    """
    with _named(path):
        if path.is_dir():
            path = _in_folder(path)
        return _indexed(path) if path.suffix == ".json" else _of_file(path)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(f"{error.filename or path}: there is no such file") from None
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}", errno=error.errno) from error


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{SUFFIX}")) if folder.is_dir() else []


def _in_folder(folder: Path) -> Path:
    if (folder / INDEX).is_file():
        return folder / INDEX
    files = _files(folder)
    if len(files) != 1:
        raise CheckpointNotFoundError(f"{folder} has no {INDEX}, and {len(files)} safetensors files: name the one")
    return files[0]


def _of_file(path: Path) -> dict[str, ForeignTensor]:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        first = file.read(8)
        try:
            header = first + file.read(header_size(first, size) - 8)
            entries = parse_header(header, size)
        except CorruptCheckpointError as error:
            raise CorruptCheckpointError(f"{path}: {error}", tensor=error.tensor) from error
    return {name: ForeignTensor(path, entry) for name, entry in entries.items()}


def _indexed(path: Path) -> dict[str, ForeignTensor]:
    if path.stat().st_size > _MAX_INDEX:
        raise CorruptCheckpointError(f"{path}: an index of more than {_MAX_INDEX} bytes")
    try:
        places = msgspec.json.decode(path.read_bytes(), type=_Index).weight_map
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise CorruptCheckpointError(f"{path}: not an index of safetensors files: {error}") from error
    files: dict[str, dict[str, ForeignTensor]] = {}
    for name in dict.fromkeys(places.values()):
        if os.path.basename(name) != name or not name.endswith(SUFFIX):
            raise CorruptCheckpointError(f"{path}: it names the file {name!r}, which can't lie beside it")
        files[name] = _of_file(path.parent / name)
    for tensor, name in places.items():
        if tensor not in files[name]:
            raise CorruptCheckpointError(f"{path}: {tensor!r} is not in {name}, where it should be", tensor=tensor)
    return {tensor: files[name][tensor] for tensor, name in places.items()}
