"""Real checkpoints on a real directory, written without torch: arrays in, a committed step out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from asyncckpt.format import names
from asyncckpt.format.image import PAGE, Image, Spec, layout
from asyncckpt.format.manifest import (
    Chunk,
    FileRecord,
    Manifest,
    PartRecord,
    PrepareRecord,
    digest,
    digest_of_chunks,
    encode,
)
from asyncckpt.storage.base import Storage

CODES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "float16": "F16", "uint32": "U32",
    "int32": "I32", "float32": "F32", "uint64": "U64", "int64": "I64", "float64": "F64",
}  # fmt: skip
"""numpy dtype -> safetensors dtype."""


@dataclass(frozen=True)
class Part:
    """What one part holds: named arrays, and a leaf tree."""

    arrays: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    tree: Any = None


def image_of(arrays: Mapping[str, np.ndarray[Any, Any]]) -> tuple[Image, bytes]:
    """The layout of `arrays`, and the whole file."""
    specs = [Spec(name, CODES[a.dtype.name], a.shape, a.dtype.itemsize) for name, a in arrays.items()]
    image = layout(specs)
    data = bytearray(image.size)
    data[: len(image.header)] = image.header
    for entry, array in zip(image.entries, arrays.values(), strict=True):
        data[entry.offset : entry.offset + entry.nbytes] = array.tobytes()
    return image, bytes(data)


def write_attempt(
    storage: Storage,
    step: int,
    parts: Mapping[str, Part],
    *,
    sequence: int | None = None,
    chunk_size: int = PAGE,
    **members: Any,
) -> Manifest:
    """Everything of a checkpoint but the commit. Publishing the manifest that it returns commits it.

    `members` are other members of the manifest.
    """
    attempt = names.new_attempt()
    folder = f"{names.step_name(step)}/{attempt}"
    storage.begin(folder)
    files: dict[str, FileRecord] = {}
    records: dict[str, PartRecord] = {}
    for name, part in parts.items():
        tree = msgspec.Raw(msgspec.json.encode(part.tree))
        if not part.arrays:
            records[name] = PartRecord(tree)
            continue
        _, data = image_of(part.arrays)
        file = storage.create(f"{folder}/{names.image_file(name)}", len(data))
        chunks = []
        for start in range(0, len(data), chunk_size):
            piece = memoryview(data)[start : start + chunk_size]
            file.write_at(start, piece)
            chunks.append(Chunk("raw", len(piece), digest(piece)))
        file.finish()
        files[names.image_file(name)] = FileRecord(len(data), digest_of_chunks(c.digest for c in chunks))
        records[name] = PartRecord(tree, names.image_file(name), len(data), chunk_size, chunks)
    record = encode(PrepareRecord(step=step, attempt=attempt, rank=0, parts=records))
    storage.put(f"{folder}/{names.RECORD}", record)
    storage.settle(folder)
    files[names.RECORD] = FileRecord(len(record), digest(record))
    members.setdefault("created", "2026-01-01T00:00:00.000+00:00")
    return Manifest(
        step=step,
        attempt=attempt,
        sequence=step if sequence is None else sequence,
        world=1,
        parts=list(parts),
        files=files,
        **members,
    )


def commit(
    storage: Storage,
    step: int,
    parts: Mapping[str, Part] | None = None,
    *,
    sequence: int | None = None,
    chunk_size: int = PAGE,
    replace: bool = False,
    **members: Any,
) -> Manifest:
    """A committed checkpoint; without `parts` a small one whose bytes depend on `step`."""
    manifest = write_attempt(storage, step, parts or small(step), sequence=sequence, chunk_size=chunk_size, **members)
    storage.publish(f"{names.step_name(step)}/{names.MANIFEST}", encode(manifest), replace=replace)
    return manifest


def small(seed: int) -> dict[str, Part]:
    return {
        "model": Part({"w": np.arange(seed, seed + 7, dtype=np.float32)}, tree={"w": {"$": "tensor", "n": "w"}}),
        "note": Part(tree={"seed": seed}),
    }


def flip(path: Path, position: int, mask: int = 1) -> None:
    """Change one byte of a file, in place."""
    with open(path, "r+b") as file:
        file.seek(position)
        (old,) = file.read(1)
        file.seek(position)
        file.write(bytes([old ^ mask]))


def snapshot(root: Path) -> dict[str, bytes | str | None]:
    """All that lies below `root`, by relative path: the bytes of files, the target of links, None for folders."""
    found: dict[str, bytes | str | None] = {}
    for path in sorted(root.rglob("*")):
        key = path.relative_to(root).as_posix()
        found[key] = str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    return found
