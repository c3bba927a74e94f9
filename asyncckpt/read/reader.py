"""One checkpoint, read. Sizes and bounds are held against the real files before memory is taken, digests before use."""

from __future__ import annotations

import copy
import mmap
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Self

import msgspec

from asyncckpt.catalog.catalog import Catalog
from asyncckpt.errors import CheckpointNotFoundError, CorruptCheckpointError, NotSupportedError
from asyncckpt.format import names
from asyncckpt.format.image import MAX_HEADER, Entry, header_size, parse_header
from asyncckpt.format.manifest import Manifest, PartRecord, PrepareRecord, decode_record
from asyncckpt.format.ranks import RankRecord, SharePart, decode_rank_records
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

    def bytes_of(self, key: str) -> bytes:
        """Those of the tensor `key`."""
        start, end = place(self.entries[key])
        return bytes(self.buffer[start:end])


class SparseImage:
    """An image of which only the chunks are read that are asked for, each verified."""

    def __init__(self, reader: CheckpointReader, part: str, record: PartRecord, chunks: _Chunks) -> None:
        self._reader, self._part, self._record, self._chunks = reader, part, record, chunks
        self._fetched: set[int] = set()
        self.buffer = allocate(record.size)

    def fetch(self, *spans: tuple[int, int]) -> None:
        """Read what is not there yet of these bytes, from start to end.

        Raises:
            CorruptCheckpointError: a chunk is missing, short, or not what was committed.
        """
        size = self._record.chunk_size
        wanted = {i for start, end in spans for i in range(start // size, -(-end // size))} - self._fetched
        with ThreadPoolExecutor(THREADS, "asyncckpt-read") as pool:
            for _ in pool.map(self._read, sorted(wanted)):
                pass
        self._fetched |= wanted

    def _read(self, index: int) -> None:
        self._chunks.read_into(index, _slice(self._record, index, self.buffer))

    def entries(self) -> dict[str, Entry]:
        """What its header says."""
        return self._reader._entries(self._part, self._record, self.buffer, lambda *span: self.fetch(span))


class CheckpointReader:
    """The checkpoint of `step`, as `rank` finds it. Opening it reads and verifies its manifest and prepare records.

    What several ranks saved is read as a whole; of what each of them had of its own (see `is_common`) it is that of
    `rank`, and of rank 0 where there was no such rank.

    Until it is closed the run's owner deletes nothing that it reads, whichever process it is in.

    Raises:
        CheckpointNotFoundError: this step is not committed.
        CorruptCheckpointError: a record is damaged.
    """

    def __init__(self, catalog: Catalog, step: int, rank: int = 0) -> None:
        self._storage = catalog.storage
        self._hold = catalog.hold(step)
        self.manifest: Manifest = catalog.manifest(step)
        self._folder = f"{names.step_name(step)}/{self.manifest.attempt}"
        self._records = self._read_records()
        self.rank = rank if rank < self.manifest.world else 0
        self._record = self._records[self.rank]

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
            return msgspec.json.decode(self._tree_of(part))
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise self.corrupt(part, f"its leaf tree is not JSON: {error}") from error

    def _tree_of(self, part: str) -> msgspec.Raw:
        record = self.part(part)
        return self._records[0].parts[part].tree if isinstance(record, SharePart) and record.same else record.tree

    def is_common(self, part: str) -> bool:
        """Whether all ranks that saved `part` together had the same of it, but for shards of its tensors."""
        return all(isinstance(share, SharePart) and share.same for share in self.shares(part)[1:])

    def seen_by(self, rank: int) -> CheckpointReader:
        """The same, as another rank finds it; open as long as this one."""
        other = copy.copy(self)
        other.rank, other._record, other._hold = rank, self._records[rank], None
        return other

    def sharded(self, part: str) -> dict[str, None]:
        """The tensors of `part` that ranks have shards of, or one has for all."""
        shares = [share for share in self.shares(part) if isinstance(share, SharePart)]
        return dict.fromkeys(name for share in shares for name in share.shards)

    def shares(self, part: str) -> list[PartRecord]:
        """What each rank has of `part`."""
        self.part(part)
        return [record.parts[part] for record in self._records]

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
        if self.manifest.world > 1:
            from asyncckpt.read.assemble import assemble

            return assemble(self, part, None if keys is None else dict.fromkeys(keys))
        if not record.size:
            for key in keys or ():
                raise self.no_tensor(part, key)
            return PartImage(memoryview(b""), {})
        with self.sparse(part, record) as image:
            if keys is None:
                image.fetch((0, record.size))
            entries = image.entries()
            for key in keys or ():
                if key not in entries:
                    raise self.no_tensor(part, key)
            image.fetch(*(place(entries[key]) for key in keys or ()))
        return PartImage(image.buffer, entries)

    @contextmanager
    def sparse(self, part: str, record: PartRecord) -> Iterator[SparseImage]:
        """The image of a part, or of one rank's share, to be read by and by. There must be one.

        Raises:
            CorruptCheckpointError: its file is missing, or has another size.
        """
        with self._open(part, record) as chunks:
            yield SparseImage(self, part, record, chunks)

    def entries(self, part: str) -> dict[str, Entry]:
        """The tensors in the image of `part`; only the chunks that hold its header are read.

        What several ranks saved is told of as if it were whole, but for where it lies.

        Raises:
            CheckpointNotFoundError: no such part.
            CorruptCheckpointError: one of these chunks is not what was committed, or the header makes no sense.
        """
        record = self.part(part)
        if self.manifest.world > 1:
            from asyncckpt.read.assemble import whole_entries

            return whole_entries(self, part)
        if not record.size:
            return {}
        room = -(-(8 + MAX_HEADER) // record.chunk_size) * record.chunk_size
        with self._open(part, record) as chunks:
            buffer = allocate(min(record.size, room))
            fetched: set[int] = set()

            def fetch(start: int, end: int) -> None:
                for index in sorted(set(range(start // record.chunk_size, -(-end // record.chunk_size))) - fetched):
                    chunks.read_into(index, _slice(record, index, buffer))
                    fetched.add(index)

            return self._entries(part, record, buffer, fetch)

    def check_alone(self) -> None:
        """
        Raises:
            NotSupportedError: several ranks saved it, so that no part has one image.
        """
        if self.manifest.world > 1:
            raise NotSupportedError(
                f"step {self.step} was saved by {self.manifest.world} ranks, so that no part of it is one file. "
                "asyncckpt export makes one, and asyncckpt.load reads it whole."
            )

    @contextmanager
    def chunks(self, part: str) -> Iterator[Callable[[int], memoryview]]:
        """A function that gives a chunk of the image of `part` by its number, verified, in memory of its own.

        Raises:
            CheckpointNotFoundError: no such part, or it has no image.
            NotSupportedError: several ranks saved it, and it has several images.
            CorruptCheckpointError, from that function: the chunk is missing, short, or not what was committed.
        """
        self.check_alone()
        record = self.part(part)
        if not record.size:
            raise CheckpointNotFoundError(f"step {self.step}, part {part!r} holds no tensors")
        with self._open(part, record) as chunks:

            def read(index: int) -> memoryview:
                chunk = allocate(min(record.chunk_size, record.size - index * record.chunk_size))
                chunks.read_into(index, chunk)
                return chunk

            yield read

    def verify(self, on_bytes: Callable[[int], None] | None = None) -> None:
        """Read every byte from the storage, not from the memory of the system, and check it; in bounded memory.

        `on_bytes` is called with the bytes of each chunk that was checked, as they are stored, from several threads.

        Raises:
            CorruptCheckpointError: where a byte is not what was committed.
        """
        for name, record in ((part, share) for part in self.parts for share in self.shares(part)):
            self.tree(name)
            if not record.size:
                continue
            with (
                self._open(name, record, cached=False) as chunks,
                ThreadPoolExecutor(THREADS, "asyncckpt-verify") as pool,
            ):

                def check(index: int, length: int, record: PartRecord = record, chunks: _Chunks = chunks) -> None:
                    chunks.read_into(index, allocate(length))
                    if on_bytes is not None:
                        on_bytes(sum(piece.stored for piece in record.pieces(index)))

                for _ in pool.map(check, count(), record.lengths):
                    pass

    def _read_records(self) -> Sequence[PrepareRecord | RankRecord]:
        """By rank."""
        if self.manifest.world == 1:
            return [decode_record(self._read_record(names.RECORD), self.manifest)]
        return decode_rank_records(map(self._read_record, self.manifest.records), self.manifest)

    def _read_record(self, name: str) -> bytes:
        try:
            return self._storage.read(f"{self._folder}/{name}", self.manifest.files[name].size)
        except FileNotFoundError:
            raise CorruptCheckpointError(
                f"step {self.step}: {name} is missing from {self._storage.url}/{self._folder}", step=self.step
            ) from None

    @contextmanager
    def _open(self, part: str, record: PartRecord, *, cached: bool = True) -> Iterator[_Chunks]:
        """The chunks of `part`, whose files are as long as they were when committed."""
        with ExitStack() as stack:
            files = [self._open_file(part, name, cached, stack) for name in record.data_files]
            yield _Chunks(PieceReader(record, files), partial(self.corrupt, part))

    def _open_file(self, part: str, name: str, cached: bool, stack: ExitStack) -> ReadableFile:
        try:
            file = self._storage.open(f"{self._folder}/{name}", cached=cached)
        except FileNotFoundError:
            raise self.corrupt(part, f"{name} is missing from {self._storage.url}/{self._folder}") from None
        stack.callback(file.close)
        committed = self.manifest.files[name].size
        if file.size != committed:
            raise self.corrupt(part, f"{name} has {file.size} bytes, not the {committed} committed")
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
            raise self.corrupt(part, str(error), tensor=error.tensor) from error

    def no_tensor(self, part: str, key: str) -> CheckpointNotFoundError:
        return CheckpointNotFoundError(f"step {self.step}, part {part!r} has no tensor {key!r}")

    def corrupt(
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


def place(entry: Entry) -> tuple[int, int]:
    """Where it begins and ends in its image."""
    return entry.offset, entry.offset + entry.nbytes


def allocate(size: int) -> memoryview:
    """Zero pages that are taken when touched, huge ones where the system gives them (not to shared memory)."""
    memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE") and size >= 4 << 20:
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)[:size]
