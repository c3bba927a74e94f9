"""One save, from arena to durable files.

Chunk by chunk, as far as the snapshot has grown: one hop on a worker thread hashes a chunk and writes it, straight
from the arena. A file is made durable when its last chunk is written; the prepare record follows when the snapshot
is sealed. Publishing is the service's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from asyncckpt.errors import CheckpointError
from asyncckpt.format import names
from asyncckpt.format.image import header_size, parse_header
from asyncckpt.format.manifest import (
    CHUNK_SIZE,
    Chunk,
    FileRecord,
    PartRecord,
    PrepareRecord,
    digest,
    digest_of_chunks,
    encode,
)
from asyncckpt.storage.base import Storage, WritableFile
from asyncckpt.write.messages import Begin, Seal, Span
from asyncckpt.write.workers import Workers

if TYPE_CHECKING:
    from asyncckpt.write.finite import FiniteScan

log = logging.getLogger("asyncckpt")


class DroppedSave(CheckpointError):
    """The trainer took this save back."""


@dataclass
class Save:
    """A save as the service knows it. All members change on the event loop only."""

    begin: Begin
    memory: memoryview
    staged: int = 0
    seal: Seal | None = None
    dropped: bool = False
    started: bool = False
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


@dataclass(frozen=True)
class Prepared:
    """An attempt all of whose files are durable, names included."""

    attempt: str
    files: dict[str, FileRecord]
    direct: bool
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
    ) -> None:
        self._save, self._attempt = save, attempt
        self._scans: dict[str, FiniteScan] | None = {} if check_finite else None
        self._storage, self._workers, self._progress = storage, workers, progress
        self.folder = f"{names.step_name(save.begin.step)}/{attempt}"
        self._slots = asyncio.Semaphore(workers.count)
        self._direct = False

    async def prepare(self) -> Prepared:
        """Write everything but the manifest.

        Raises:
            DroppedSave: the trainer took the save back.
            StorageError: the storage failed.
        """
        parts: dict[str, asyncio.Task[list[Chunk]]] = {}
        async with asyncio.TaskGroup() as group:
            for span in self._save.begin.spans:
                if span.size:
                    parts[span.part] = group.create_task(self._write_part(span))
        tables = {part: task.result() for part, task in parts.items()}
        await self._save.until(lambda: self._save.seal is not None)
        record = self._record(tables)
        await self._workers.run(self._storage.put, f"{self.folder}/{names.RECORD}", record)
        await self._workers.run(self._storage.settle, self.folder)
        files = {names.RECORD: FileRecord(len(record), digest(record))}
        for span in self._save.begin.spans:
            if span.size:
                chunks = tables[span.part]
                files[names.image_file(span.part)] = FileRecord(span.size, digest_of_chunks(c.digest for c in chunks))
        return Prepared(self._attempt, files, self._direct, self._nonfinite())

    async def _write_part(self, span: Span) -> list[Chunk]:
        key = f"{self.folder}/{names.image_file(span.part)}"
        file = await self._workers.run(self._storage.create, key, span.size)
        try:
            scan = None if self._scans is None else await self._scan(span)
            async with asyncio.TaskGroup() as group:
                chunks = []
                for start in range(0, span.size, CHUNK_SIZE):
                    end = min(start + CHUNK_SIZE, span.size)
                    await self._save.until(lambda end=end: self._save.staged >= span.offset + end)  # type: ignore[misc]
                    await self._slots.acquire()
                    chunks.append(group.create_task(self._write_chunk(file, span, start, end, scan)))
            self._direct = self._direct or getattr(file, "direct", False)
            await self._workers.run(file.finish)
        except BaseException:
            file.abort()
            raise
        return [chunk.result() for chunk in chunks]

    async def _scan(self, span: Span) -> FiniteScan:
        """What looks for NaN and inf in the part, made once its header is staged."""
        from asyncckpt.write.finite import FiniteScan  # numpy is loaded only where it is wanted

        image = self._save.memory[span.offset : span.offset + span.size]
        await self._save.until(lambda: self._save.staged >= span.offset + 8)
        end = header_size(bytes(image[:8]), span.size)
        await self._save.until(lambda: self._save.staged >= span.offset + end)
        scan = await self._workers.run(lambda: FiniteScan(parse_header(bytes(image[:end]), span.size)))
        assert self._scans is not None
        self._scans[span.part] = scan
        return scan

    def _nonfinite(self) -> dict[str, list[str]] | None:
        if self._scans is None:
            return None
        return {span.part: self._scans[span.part].found if span.size else [] for span in self._save.begin.spans}

    async def _write_chunk(
        self, file: WritableFile, span: Span, start: int, end: int, scan: FiniteScan | None
    ) -> Chunk:
        try:
            data = self._save.memory[span.offset + start : span.offset + end]
            chunk = await self._workers.run(_hop, file, start, data, scan)
        finally:
            self._slots.release()
        self._save.written += end - start
        self._progress(self._save)
        return chunk

    def _record(self, tables: dict[str, list[Chunk]]) -> bytes:
        begin, seal = self._save.begin, self._save.seal
        assert seal is not None
        trees = msgspec.json.decode(
            self._save.memory[seal.offset : seal.offset + seal.size], type=dict[str, msgspec.Raw]
        )
        nonfinite = self._nonfinite()
        parts = {
            span.part: PartRecord(
                tree=trees[span.part],
                file=names.image_file(span.part) if span.size else None,
                size=span.size,
                chunk_size=CHUNK_SIZE,
                chunks=tables.get(span.part, []),
                nonfinite=None if nonfinite is None else nonfinite[span.part],
            )
            for span in begin.spans
        }
        return encode(PrepareRecord(step=begin.step, attempt=self._attempt, rank=0, parts=parts))


def _hop(file: WritableFile, offset: int, data: memoryview, scan: FiniteScan | None) -> Chunk:
    chunk = Chunk("raw", len(data), digest(data))
    if scan is not None:
        scan.look(offset, data)
    file.write_at(offset, data)
    return chunk
