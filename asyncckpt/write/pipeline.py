"""One save, from arena to durable files.

Chunk by chunk, as far as the snapshot has grown: one hop on a worker thread hashes a chunk, unless the trainer has,
codes it where it is to be coded, and writes it, straight from the arena where it is not. A file is made durable when
its last chunk is written; the prepare record follows when the snapshot is sealed. Publishing is the service's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from asyncckpt.errors import CheckpointError, StorageError
from asyncckpt.format import names
from asyncckpt.format.image import Entry, header_size, parse_header
from asyncckpt.format.manifest import CHUNK_SIZE as CHUNK_SIZE  # also for `testing`, which tells of chunks of this size
from asyncckpt.format.manifest import FileRecord, PartRecord, PrepareRecord, digest, encode
from asyncckpt.policy.codec import Name
from asyncckpt.storage.base import Storage
from asyncckpt.write.bases import Base
from asyncckpt.write.coded import CodedPart
from asyncckpt.write.coding import Coding, Trial
from asyncckpt.write.messages import Begin, Hashed, Seal, Span
from asyncckpt.write.meter import Meter
from asyncckpt.write.parts import NO_TREE, PartWriter, Place, WrittenPart
from asyncckpt.write.raw import RawPart
from asyncckpt.write.workers import Workers

if TYPE_CHECKING:  # numpy is loaded only where it is wanted
    from asyncckpt.write.finite import FiniteScan

log = logging.getLogger("asyncckpt")

_MOST = 4
"""Chunks of one hop: what the event loop does for a hop takes as long as a core hashes a chunk. A save that is dropped
waits for hops that are begun."""


class DroppedSave(CheckpointError):
    """The trainer took this save back."""


@dataclass
class Save:
    """A save as the service knows it. All members change on the event loop only."""

    begin: Begin
    memory: memoryview
    staged: int = 0
    hashed: dict[tuple[str, int], Hashed] = field(default_factory=dict)
    """The chunks that the trainer has hashed, by part and where they begin."""
    seal: Seal | None = None
    dropped: bool = False
    started: bool = False
    orphaned: bool = False
    committed: bool = False
    """Rank 0 has said so."""
    written: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def touch(self) -> None:
        self.changed.set()

    async def until(self, ready: Callable[[], bool]) -> None:
        """Wait for `ready`.

        Raises:
            DroppedSave: the trainer took the save back meanwhile.
        """
        while True:
            if self.dropped:
                raise DroppedSave
            if ready():
                return
            self.changed.clear()
            await self.changed.wait()

    async def rest(self, seconds: float) -> None:
        """Wait until something of this save changes, or for `seconds`.

        Raises:
            DroppedSave: the trainer took the save back meanwhile.
        """
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.changed.wait(), seconds)
        self.changed.clear()
        await self.until(lambda: True)


@dataclass(frozen=True)
class Prepared:
    """An attempt all of whose files are durable, names included."""

    attempt: str
    files: dict[str, FileRecord]
    direct: bool
    written: int
    """Bytes of files that are new, and not shared with an earlier checkpoint."""
    parts: dict[str, WrittenPart]
    nonfinite: dict[str, list[str]] | None
    """By part, the tensors that hold NaN or inf; None where nobody looked."""

    def finite(self, exports: Collection[str]) -> bool | None:
        """Whether all is finite that a training is resumed from: a cast may overflow, and harms none."""
        if self.nonfinite is None:
            return None
        return not any(found for part, found in self.nonfinite.items() if part not in exports)


class Attempt:
    """One try at writing `save` under a folder of its own, which must have been begun."""

    def __init__(
        self,
        save: Save,
        attempt: str,
        storage: Storage,
        workers: Workers,
        progress: Callable[[Save], None],
        check_finite: bool = False,
        codec: Name = "raw",
        coding: Coding | None = None,
        bases: Mapping[str, Base] | None = None,
        origins: Mapping[str, Base] | None = None,
    ) -> None:
        """`bases` are parts as they were committed last; `origins` too, where nothing is to hang on them any more.

        With `codec` "raw" and `coding`, that is only tried.
        """
        self._save, self._attempt = save, attempt
        self._scans: dict[str, FiniteScan] | None = {} if check_finite else None
        self._storage, self._workers, self._progress = storage, workers, progress
        self._codec, self._coding, self._bases = codec, coding, bases or {}
        self._origins = self._bases if origins is None else origins
        self._rank: int | None = None
        """Of one of several, whose share this is."""
        self.meter = Meter()
        self.folder = f"{names.step_name(save.begin.step)}/{attempt}"
        self._slots = asyncio.Semaphore(workers.count)

    async def prepare(self) -> Prepared:
        """Write everything but the manifest.

        Raises:
            DroppedSave: the trainer took the save back.
            BaseGone: files of `bases` are not there any more.
            StorageError: the storage failed.
        """
        tasks: dict[str, asyncio.Task[WrittenPart]] = {}
        async with asyncio.TaskGroup() as group:
            for span in self._save.begin.spans:
                if span.size:
                    tasks[span.part] = group.create_task(self._write_part(span))
        parts = {part: task.result() for part, task in tasks.items()}
        await self._save.until(lambda: self._save.seal is not None)
        return await self._store_record(parts)

    def last_call(self) -> None:
        """Called right before the manifest is published; raises where that must not be done any more."""

    async def _store_record(self, parts: Mapping[str, WrittenPart]) -> Prepared:
        """Make the record, and all names, durable."""
        step = self._save.begin.step
        record = encode(PrepareRecord(step=step, attempt=self._attempt, rank=0, parts=self._records(parts)))
        await self._workers.run(self._storage.put, f"{self.folder}/{names.RECORD}", record)
        await self._workers.run(self._storage.settle, self.folder)
        return self._prepared_of({names.RECORD: FileRecord(len(record), digest(record))}, parts)

    def _prepared_of(self, records: dict[str, FileRecord], parts: Mapping[str, WrittenPart]) -> Prepared:
        files = dict(records)
        for part in parts.values():
            files |= part.files
        written = sum(record.size for record in records.values()) + sum(part.written for part in parts.values())
        direct = any(part.direct for part in parts.values())
        return Prepared(self._attempt, files, direct, written, dict(parts), self._nonfinite())

    async def _write_part(self, span: Span) -> WrittenPart:
        writer = await self._writer(span)
        try:
            scan = None if self._scans is None else await self._scan(span)
            async with asyncio.TaskGroup() as group:
                start = 0
                while start < span.size:
                    await self._staged(span, min(start + CHUNK_SIZE, span.size))
                    await self._slots.acquire()
                    end = self._end_of_hop(span, start)
                    group.create_task(self._write_chunks(writer, span, start, end, scan))
                    start = end
            return await self._workers.run(writer.finish)
        except BaseException:
            writer.abort()
            raise

    async def _writer(self, span: Span) -> PartWriter:
        about = self._attempt, span.part, names.image_file(span.part, self._rank), span.size
        place = Place(self._storage, self.folder, *about, CHUNK_SIZE, self.meter, self._rank)
        if self._coding is None:
            return await self._workers.run(RawPart, place)
        coding, plain = self._coding, self._codec == "incremental"
        entries = {} if plain else await self._entries(span)
        if self._codec == "raw":
            return await self._workers.run(lambda: RawPart(place, Trial(place, coding, entries)))
        before = self._bases.get(span.part), self._origins.get(span.part)
        return await self._workers.run(CodedPart, place, coding, entries, *before, plain)

    async def _entries(self, span: Span) -> dict[str, Entry]:
        """What the image holds, once its header is staged."""
        image = self._save.memory[span.offset : span.offset + span.size]
        await self._staged(span, min(8, span.size))
        end = header_size(bytes(image[:8]), span.size)
        await self._staged(span, end)
        return await self._workers.run(lambda: parse_header(bytes(image[:end]), span.size))

    async def _scan(self, span: Span) -> FiniteScan:
        """What looks for NaN and inf in the part."""
        from asyncckpt.write.finite import FiniteScan

        assert self._scans is not None
        scan = self._scans[span.part] = FiniteScan(await self._entries(span))
        return scan

    def _nonfinite(self) -> dict[str, list[str]] | None:
        if self._scans is None:
            return None
        return {span.part: self._scans[span.part].found if span.size else [] for span in self._save.begin.spans}

    async def _staged(self, span: Span, end: int) -> None:
        """Wait until the first `end` bytes of `span` are what they will stay."""
        await self._save.until(lambda: self._save.staged >= span.offset + end)

    def _end_of_hop(self, span: Span, start: int) -> int:
        """How far the next hop goes: over several chunks only while there is plenty for every thread."""
        here = min(self._save.staged - span.offset, span.size) - start
        count = max(1, min(here // CHUNK_SIZE // self._workers.count, _MOST))
        return min(start + count * CHUNK_SIZE, span.size)

    async def _write_chunks(
        self, writer: PartWriter, span: Span, start: int, end: int, scan: FiniteScan | None
    ) -> None:
        try:
            await self._workers.run(self._hop, writer, span, start, end, scan)
        finally:
            self._slots.release()
        self._save.written += end - start
        self._progress(self._save)

    def _hop(self, writer: PartWriter, span: Span, start: int, end: int, scan: FiniteScan | None) -> None:
        for begin in range(start, end, CHUNK_SIZE):
            index, hashed = begin // CHUNK_SIZE, self._save.hashed.get((span.part, begin))
            data = self._save.memory[span.offset + begin : span.offset + min(begin + CHUNK_SIZE, end)]
            if hashed is not None and hashed.size != len(data):
                raise StorageError(f"chunk {index} of {span.part!r} was hashed as one of {hashed.size} bytes")
            if hashed is not None and hashed.same:
                writer.same(index, len(data), hashed.digest)
                continue
            writer.write(index, data, digest(data) if hashed is None else hashed.digest)
            if scan is not None:
                scan.look(begin, data)

    def _records(self, written: Mapping[str, WrittenPart]) -> dict[str, PartRecord]:
        """The parts, by name; one that has no tree of its own (see `Seal`) with a null in its place."""
        seal = self._save.seal
        assert seal is not None
        trees = msgspec.json.decode(
            self._save.memory[seal.offset : seal.offset + seal.size], type=dict[str, msgspec.Raw]
        )
        nonfinite = self._nonfinite()
        return {
            span.part: msgspec.structs.replace(
                written[span.part].record if span.part in written else PartRecord(NO_TREE),
                tree=trees.get(span.part, NO_TREE),
                nonfinite=None if nonfinite is None else nonfinite[span.part],
            )
            for span in self._save.begin.spans
        }


def leaves(group: BaseException) -> Iterator[BaseException]:
    """The plain exceptions in a tree of groups."""
    if isinstance(group, BaseExceptionGroup):
        for error in group.exceptions:
            yield from leaves(error)
    else:
        yield group
