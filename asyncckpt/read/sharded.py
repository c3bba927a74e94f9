"""A part of a checkpoint as several safetensors files with an index, as models are published."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from asyncckpt.errors import CheckpointExistsError, CheckpointNotFoundError, StorageError
from asyncckpt.format.image import layout
from asyncckpt.read.export import DTYPES, METADATA, Copy, Exported, contents, new_file, settle, write_at
from asyncckpt.read.foreign import INDEX
from asyncckpt.read.reader import CheckpointReader

WHOLE = "model.safetensors"


@dataclass(frozen=True)
class Sharded:
    """What was written: the tensors by file, and the bytes of all files."""

    files: dict[str, list[Exported]]
    size: int

    @property
    def tensors(self) -> int:
        return sum(map(len, self.files.values()))


def export_sharded(
    reader: CheckpointReader,
    part: str,
    folder: Path,
    max_size: int,
    dtype: str | None = None,
    *,
    overwrite: bool = False,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> Sharded:
    """Write the tensors of `part` to files of at most `max_size` bytes of tensors (or one larger tensor) in `folder`.

    They are called model-00001-of-00003.safetensors and so on, and model.safetensors.index.json, which appears last,
    says which tensor is where; if all fits into one, it is model.safetensors alone. Everything else is as in
    `export.export`.

    Raises:
        CheckpointNotFoundError: no such part, or it holds no tensors.
        CheckpointExistsError: one of the files is there already, and `overwrite` is not given.
        CorruptCheckpointError: a byte is not what was committed.
        StorageError: a file can't be written.
    """
    found = contents(reader, part, None if dtype is None else DTYPES[dtype])
    if not found:
        raise CheckpointNotFoundError(f"step {reader.step}, part {part!r} holds no tensors")
    groups = _grouped(found, max_size)
    count = len(groups)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] if count > 1 else [WHOLE]
    _make(folder)
    for name in [*names, INDEX]:
        if not overwrite and os.path.lexists(folder / name):
            raise CheckpointExistsError(f"{folder / name} is there already; nothing was written")
    total = 0
    for name, group in zip(names, groups, strict=True):
        image = layout([item.spec for item in group], METADATA)
        with new_file(folder / name, image.size, overwrite) as file:
            write_at(file, 0, memoryview(image.header))
            Copy(reader, part, file, image, group).run(on_bytes)
        total += image.size
    files = dict(zip(names, groups, strict=True))
    if count > 1:
        total += _store_index(folder, files, overwrite)
    return Sharded(files, total)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
        settle(folder.parent)
    except OSError as error:
        raise StorageError(f"{folder}: {error.strerror or error}", errno=error.errno) from error


def _grouped(found: list[Exported], max_size: int) -> list[list[Exported]]:
    """In order, as many as fit."""
    groups: list[list[Exported]] = [[]]
    held = 0
    for item in found:
        if groups[-1] and held + item.spec.nbytes > max_size:
            groups.append([])
            held = 0
        groups[-1].append(item)
        held += item.spec.nbytes
    return groups


def _store_index(folder: Path, files: dict[str, list[Exported]], overwrite: bool) -> int:
    where = {item.spec.name: name for name, group in files.items() for item in group}
    size = sum(item.spec.nbytes for group in files.values() for item in group)
    index = msgspec.json.format(msgspec.json.encode({"metadata": {"total_size": size}, "weight_map": where}))
    with new_file(folder / INDEX, len(index), overwrite) as file:
        write_at(file, 0, memoryview(index))
    return len(index)
