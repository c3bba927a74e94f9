"""The image of a part out of streams of bytes: for what is converted, or comes of another library, tensor by tensor.

Memory is bounded by a few chunks, and by what a source holds at once. The calling thread fills chunks, in the order of
the image; others hash and write them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue

import numpy as np

from asyncckpt.errors import CheckpointError
from asyncckpt.format.digests import digest
from asyncckpt.format.image import Image
from asyncckpt.format.manifest import CHUNK_SIZE
from asyncckpt.read.reader import allocate
from asyncckpt.storage.base import Storage
from asyncckpt.write.meter import Meter
from asyncckpt.write.parts import Place, WrittenPart
from asyncckpt.write.raw import RawPart

Source = Callable[[], Iterable[memoryview]]
"""Gives the bytes of one tensor, row by row, in pieces of any size. Called once, when they are wanted."""

THREADS = 4


def write_image(
    storage: Storage, folder: str, part: str, file: str, image: Image, sources: Sequence[Source]
) -> WrittenPart:
    """Write `image`, whose entries are those of `sources`, to a new `file` of `folder`; return when it is durable.

    Raises:
        CheckpointError: a source gave more or fewer bytes than its entry has.
        StorageError: the storage failed.
    """
    place = Place(storage, folder, folder.rpartition("/")[2], part, file, image.size, CHUNK_SIZE, Meter())
    writer = RawPart(place)
    free: SimpleQueue[memoryview] = SimpleQueue()
    for _ in range(min(THREADS + 1, -(-image.size // CHUNK_SIZE))):
        free.put(allocate(min(CHUNK_SIZE, image.size)))

    def write(index: int, buffer: memoryview, size: int) -> None:
        try:
            writer.write(index, buffer[:size], digest(buffer[:size]))
        finally:
            free.put(buffer)

    try:
        running: deque[Future[None]] = deque()
        with ThreadPoolExecutor(THREADS, "asyncckpt-write") as pool:
            for index, (buffer, size) in enumerate(_chunks(image, sources, free.get)):
                running.append(pool.submit(write, index, buffer, size))
                while running and running[0].done():
                    running.popleft().result()
        for future in running:
            future.result()
        return writer.finish()
    except BaseException:
        writer.abort()
        raise


def _chunks(
    image: Image, sources: Sequence[Source], take: Callable[[], memoryview]
) -> Iterator[tuple[memoryview, int]]:
    """The bytes of the image in buffers that `take` gives, all full but the last, each with its size."""
    buffer, used = take(), 0
    for data in _bytes(image, sources):
        start = 0
        while start < len(data):
            size = min(len(data) - start, CHUNK_SIZE - used)
            np.copyto(np.frombuffer(buffer, np.uint8, size, used), np.frombuffer(data, np.uint8, size, start))
            start, used = start + size, used + size
            if used == CHUNK_SIZE:
                yield buffer, used
                buffer, used = take(), 0
    if used:
        yield buffer, used


def _bytes(image: Image, sources: Sequence[Source]) -> Iterator[memoryview]:
    yield memoryview(image.header)
    for i in sorted(range(len(sources)), key=lambda i: image.entries[i].offset):
        entry = image.entries[i]
        if not entry.nbytes:
            continue
        left = entry.nbytes
        for data in sources[i]():
            left -= len(data)
            if left < 0:
                break
            yield data
        if left:
            raise CheckpointError(
                f"tensor {entry.name!r}: its source did not give the {entry.nbytes} bytes that it has"
            )
