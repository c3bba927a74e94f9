"""A part, verified, in a file without a name, mapped into memory: for those who need it all, but not all at once."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from asyncckpt.errors import StorageError
from asyncckpt.format.image import ITEM_SIZE, Entry, Spec, layout
from asyncckpt.read.reader import CheckpointReader, PartImage

_BATCH = 64 << 20
"""Bytes of tensors that are read together where they lie in several images."""


@dataclass(frozen=True)
class Spooled:
    """The image of a part. `forget` lets go of the memory that its pages took since: they are read again when used."""

    image: PartImage
    forget: Callable[[], None]


@contextmanager
def spooled(
    reader: CheckpointReader, part: str, folder: Path, on_bytes: Callable[[int], None] = lambda count: None
) -> Iterator[Spooled]:
    """The image of `part` by way of a file in `folder`, which needs as much room, and goes at the end of the block.

    Raises:
        CheckpointNotFoundError: no such part.
        CorruptCheckpointError: a byte is not what was committed.
        StorageError: the file can't be written.
    """
    entries = reader.entries(part)
    if not entries:
        yield Spooled(PartImage(memoryview(b""), {}), lambda: None)
        return
    try:
        with tempfile.TemporaryFile(dir=folder, prefix=".asyncckpt-", buffering=0) as file:
            if reader.manifest.world == 1:
                size = reader.part(part).size
                _copy_chunks(reader, part, file.fileno(), size, on_bytes)
            else:
                entries, size = _copy_entries(reader, part, file.fileno(), entries, on_bytes)
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    except OSError as error:
        if isinstance(error, StorageError) or error.errno is None:
            raise
        raise StorageError(f"{folder}: {error.strerror or error}", errno=error.errno) from error

    def forget() -> None:
        if hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)

    yield Spooled(PartImage(memoryview(mapped), entries), forget)


def _copy_chunks(reader: CheckpointReader, part: str, file: int, size: int, on_bytes: Callable[[int], None]) -> None:
    chunk_size = reader.part(part).chunk_size
    with reader.chunks(part) as read:
        for index in range(-(-size // chunk_size)):
            chunk = read(index)
            _write(file, index * chunk_size, chunk)
            on_bytes(len(chunk))


def _copy_entries(
    reader: CheckpointReader, part: str, file: int, entries: dict[str, Entry], on_bytes: Callable[[int], None]
) -> tuple[dict[str, Entry], int]:
    """Tensors that lie in several images, put together; where they are now, and the size of it all."""
    image = layout([Spec(e.name, e.dtype, e.shape, ITEM_SIZE[e.dtype]) for e in entries.values()])
    os.ftruncate(file, image.size)
    placed = {entry.name: entry for entry in image.entries}
    batch: list[str] = []
    for name in [*placed, None]:
        held = sum(placed[other].nbytes for other in batch)
        if batch and (name is None or held + placed[name].nbytes > _BATCH):
            found = reader.image(part, batch)
            for other in batch:
                entry = found.entries[other]
                _write(file, placed[other].offset, found.buffer[entry.offset : entry.offset + entry.nbytes])
            on_bytes(held)
            batch = []
        if name is not None:
            batch.append(name)
    return placed, image.size


def _write(file: int, offset: int, data: memoryview) -> None:
    while len(data):
        done = os.pwrite(file, data, offset)
        data, offset = data[done:], offset + done
