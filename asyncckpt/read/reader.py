"""One checkpoint, read. Sizes and bounds are held against the real files before memory is taken, digests before use."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Self

import msgspec

from asyncckpt.catalog.catalog import Catalog
from asyncckpt.errors import CheckpointNotFoundError, CorruptCheckpointError
from asyncckpt.format import names
from asyncckpt.format.image import MAX_HEADER, Entry, header_size, parse_header
from asyncckpt.format.manifest import Manifest, PartRecord, PrepareRecord, decode_record
from asyncckpt.read.pieces import Bench, PieceReader
from asyncckpt.storage.base import ReadableFile

if TYPE_CHECKING:  # it would load numpy, which is a third of the time that a command line takes
    from asyncckpt.format.tree import Node

THREADS = 4


@dataclass(frozen=True)
class PartImage:
    """An image in memory of its own (page-aligned, zero-filled, only verified chunks filled in)."""

    buffer: memoryview
    entries: dict[str, Entry]


class CheckpointReader:
    """The checkpoint of `step`. Opening it reads and verifies its manifest and prepare record.

    Until it is closed the run's owner deletes nothing that it reads, whichever process it is in.

    Raises:
        CheckpointNotFoundError: this step is not committed.
        CorruptCheckpointError: a record is damaged.
    """

    def __init__(self, catalog: Catalog, step: int) -> None:
        self._storage = catalog.storage
        self._hold = catalog.hold(step)
        self.manifest: Manifest = catalog.manifest(step)
        self._folder = f"{names.step_name(step)}/{self.manifest.attempt}"
        self._record: PrepareRecord = self._read_record()

    def close(self) -> None:
        if self._hold is not None:
            self._hold.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def parts(self) -> list[str]:
        return list(self._record.parts)

    def tree(self, part: str) -> Node:
        """The leaf tree of `part`, as JSON gave it."""
        try:
            return msgspec.json.decode(self.part(part).tree)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise self._corrupt(part, f"its leaf tree is not JSON: {error}") from error

    def part(self, part: str) -> PartRecord:
        try:
            return self._record.parts[part]
        except KeyError:
            raise CheckpointNotFoundError(
                f"step {self.step} of {self._storage.url} has no part {part!r}; it has {', '.join(self.parts)}"
            ) from None

    def image(self, part: str, keys: Iterable[str] | None = None) -> PartImage:
        """The image of `part`, or only the chunks that hold the tensors `keys`.

        Raises:
            CheckpointNotFoundError: no such part or tensor.
            CorruptCheckpointError: a chunk is missing, short, or not what was committed.
        """
        record = self.part(part)
        if not record.size:
            for key in keys or ():
                raise self._no_tensor(part, key)
            return PartImage(memoryview(b""), {})
        with self._open(part, record) as chunks, ThreadPoolExecutor(THREADS, "asyncckpt-read") as pool:
            buffer = _allocate(record.size)
            fetched: set[int] = set()

            def fetch(start: int, end: int) -> None:
                wanted = set(range(start // record.chunk_size, -(-end // record.chunk_size))) - fetched
                for _ in pool.map(lambda i: chunks.read_into(i, _slice(record, i, buffer)), sorted(wanted)):
                    pass
                fetched.update(wanted)

            if keys is None:
                fetch(0, record.size)
            entries = self._entries(part, record, buffer, fetch)
            for key in keys or ():
                if key not in entries:
                    raise self._no_tensor(part, key)
                fetch(entries[key].offset, entries[key].offset + entries[key].nbytes)
        return PartImage(buffer, entries)

    def entries(self, part: str) -> dict[str, Entry]:
        """The tensors in the image of `part`; only the chunks that hold its header are read.

        Raises:
            CheckpointNotFoundError: no such part.
            CorruptCheckpointError: one of these chunks is not what was committed, or the header makes no sense.
        """
        record = self.part(part)
        if not record.size:
            return {}
        room = -(-(8 + MAX_HEADER) // record.chunk_size) * record.chunk_size
        with self._open(part, record) as chunks:
            buffer = _allocate(min(record.size, room))
            fetched: set[int] = set()

            def fetch(start: int, end: int) -> None:
                for index in sorted(set(range(start // record.chunk_size, -(-end // record.chunk_size))) - fetched):
                    chunks.read_into(index, _slice(record, index, buffer))
                    fetched.add(index)

            return self._entries(part, record, buffer, fetch)

    @contextmanager
    def chunks(self, part: str) -> Iterator[Callable[[int], memoryview]]:
        """A function that gives a chunk of the image of `part` by its number, verified, in memory of its own.

        Raises:
            CheckpointNotFoundError: no such part, or it has no image.
            CorruptCheckpointError, from that function: the chunk is missing, short, or not what was committed.
        """
        record = self.part(part)
        if not record.size:
            raise CheckpointNotFoundError(f"step {self.step}, part {part!r} holds no tensors")
        with self._open(part, record) as chunks:

            def read(index: int) -> memoryview:
                chunk = _allocate(min(record.chunk_size, record.size - index * record.chunk_size))
                chunks.read_into(index, chunk)
                return chunk

            yield read

    def verify(self, on_bytes: Callable[[int], None] | None = None) -> None:
        """Read every byte from the storage, not from the memory of the system, and check it; in bounded memory.

        `on_bytes` is called with the bytes of each chunk that was checked, as they are stored, from several threads.

        Raises:
            CorruptCheckpointError: where a byte is not what was committed.
        """
        for name, record in self._record.parts.items():
            self.tree(name)
            if not record.size:
                continue
            with (
                self._open(name, record, cached=False) as chunks,
                ThreadPoolExecutor(THREADS, "asyncckpt-verify") as pool,
            ):

                def check(index: int, length: int, record: PartRecord = record, chunks: _Chunks = chunks) -> None:
                    chunks.read_into(index, _allocate(length))
                    if on_bytes is not None:
                        on_bytes(sum(piece.stored for piece in record.pieces(index)))

                for _ in pool.map(check, count(), record.lengths):
                    pass

    def _read_record(self) -> PrepareRecord:
        key = f"{self._folder}/{names.RECORD}"
        try:
            data = self._storage.read(key, self.manifest.files[names.RECORD].size)
        except FileNotFoundError:
            raise CorruptCheckpointError(
                f"step {self.step}: {names.RECORD} is missing from {self._storage.url}/{self._folder}", step=self.step
            ) from None
        return decode_record(data, self.manifest)

    @contextmanager
    def _open(self, part: str, record: PartRecord, *, cached: bool = True) -> Iterator[_Chunks]:
        """The chunks of `part`, whose files are as long as they were when committed."""
        with ExitStack() as stack:
            files = [self._open_file(part, name, cached, stack) for name in record.data_files]
            yield _Chunks(PieceReader(record, files), partial(self._corrupt, part))

    def _open_file(self, part: str, name: str, cached: bool, stack: ExitStack) -> ReadableFile:
        try:
            file = self._storage.open(f"{self._folder}/{name}", cached=cached)
        except FileNotFoundError:
            raise self._corrupt(part, f"{name} is missing from {self._storage.url}/{self._folder}") from None
        stack.callback(file.close)
        committed = self.manifest.files[name].size
        if file.size != committed:
            raise self._corrupt(part, f"{name} has {file.size} bytes, not the {committed} committed")
        return file

    def _entries(
        self, part: str, record: PartRecord, buffer: memoryview, fetch: Callable[[int, int], None]
    ) -> dict[str, Entry]:
        try:
            fetch(0, min(8, record.size))
            end = header_size(bytes(buffer[:8]), record.size)
            fetch(0, end)
            return parse_header(bytes(buffer[:end]), record.size)
        except CorruptCheckpointError as error:
            if error.part is not None:
                raise
            raise self._corrupt(part, str(error), tensor=error.tensor) from error

    def _no_tensor(self, part: str, key: str) -> CheckpointNotFoundError:
        return CheckpointNotFoundError(f"step {self.step}, part {part!r} has no tensor {key!r}")

    def _corrupt(
        self, part: str, why: str, tensor: str | None = None, chunk: int | None = None
    ) -> CorruptCheckpointError:
        message = f"step {self.step}, part {part!r}: {why}"
        return CorruptCheckpointError(message, step=self.step, part=part, tensor=tensor, chunk=chunk)


class _Chunks:
    """Chunks of one part, for some threads at once; what is wrong with one is told as `corrupt` puts it."""

    def __init__(self, pieces: PieceReader, corrupt: Callable[..., CorruptCheckpointError]) -> None:
        self._pieces, self._corrupt = pieces, corrupt
        self._benches = threading.local()

    def read_into(self, index: int, target: memoryview) -> None:
        """Fill `target`, which is as long as chunk `index`, and verify it."""
        bench = self._benches.__dict__.setdefault("bench", Bench())
        try:
            self._pieces.read_into(index, target, bench)
        except CorruptCheckpointError as error:
            raise self._corrupt(str(error), chunk=index) from error


def _slice(record: PartRecord, index: int, image: memoryview) -> memoryview:
    """Chunk `index` of an image."""
    return image[index * record.chunk_size : (index + 1) * record.chunk_size]


def _allocate(size: int) -> memoryview:
    """Zero pages that are taken when touched, huge ones where the system gives them (not to shared memory)."""
    memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE") and size >= 4 << 20:
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)[:size]
