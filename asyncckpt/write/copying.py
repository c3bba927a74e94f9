"""One committed step, from where it lies to another storage: the same files under the same names.

File by file, in runs that begin at a page, each read, held against the digest of what was committed, and only then
written; memory is that of a few runs. The digests of coded pieces are those of what they decode to: such a file is
decoded once to learn, of verified bytes, what its own are.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from asyncckpt.catalog.catalog import Catalog
from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.format import names
from asyncckpt.format.digests import digest
from asyncckpt.format.manifest import MAX_MANIFEST, Manifest, PartRecord, check_record_bytes, decode_manifest
from asyncckpt.format.pieces import PAGE
from asyncckpt.read.pieces import Bench, PieceReader
from asyncckpt.read.reader import CheckpointReader, allocate
from asyncckpt.storage.base import ReadableFile, Storage, WritableFile
from asyncckpt.write.pipeline import leaves
from asyncckpt.write.workers import Workers

Finished = Callable[[str], Awaitable[None]]

_RUN = 8 << 20
"""The most bytes of a run that no piece lies in."""


class Superseded(Exception):
    """The step is committed as another attempt by now, or is gone."""


@dataclass(frozen=True)
class Piece:
    """Bytes of a file that a checkpoint has, and their digest as they are stored."""

    offset: int
    size: int
    digest: str


@dataclass(frozen=True)
class Stretch:
    """Bytes of a file that are copied at once, and the piece that they begin with, if one."""

    start: int
    end: int
    piece: Piece | None = None


def stretches(size: int, pieces: Iterable[Piece]) -> Iterator[Stretch]:
    """All bytes of a file of `size`, whose `pieces` begin at pages and do not overlap, in order."""
    position = 0
    for piece in sorted(pieces, key=lambda piece: piece.offset):
        yield from _bare(position, piece.offset)
        position = min(-(-(piece.offset + piece.size) // PAGE) * PAGE, size)
        yield Stretch(piece.offset, position, piece)
    yield from _bare(position, size)


def _bare(start: int, end: int) -> Iterator[Stretch]:
    for position in range(start, end, _RUN):
        yield Stretch(position, min(position + _RUN, end))


class _Listening:
    """A file, and the digests of what was read from it, by place."""

    def __init__(self, file: ReadableFile) -> None:
        self._file = file
        self.heard: dict[int, Piece] = {}

    @property
    def size(self) -> int:
        return self._file.size

    def read_into(self, offset: int, buffer: memoryview) -> int:
        done = self._file.read_into(offset, buffer)
        self.heard[offset] = Piece(offset, done, digest(buffer[:done]))
        return done

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True)
class Surroundings:
    """What all copies of a mirror share. `pace` is awaited before so many bytes are written; `slots` are for what is in
    memory, `parts` for what is open."""

    source: Catalog
    target: Storage
    workers: Workers
    pace: Callable[[int], Awaitable[None]]
    slots: asyncio.Semaphore
    parts: asyncio.Semaphore


class StepCopy:
    """The copy of `step` as `attempt`, which stays held until `close`.

    Raises:
        Superseded: it is committed as another attempt by now, or is gone.
        CorruptCheckpointError: its records are damaged.
        StorageError: it can't be read.
    """

    def __init__(self, around: Surroundings, step: int, attempt: str) -> None:
        self._around, self._step = around, step
        self.folder = f"{names.step_name(step)}/{attempt}"
        try:
            self._reader = CheckpointReader(around.source, step)
        except FileNotFoundError:
            raise Superseded from None
        self.manifest: Manifest = self._reader.manifest
        if self.manifest.attempt != attempt:
            self.close()
            raise Superseded

    def close(self) -> None:
        self._reader.close()

    def manifest_bytes(self) -> bytes:
        """The commit record itself."""
        try:
            key = f"{names.step_name(self._step)}/{names.MANIFEST}"
            data = self._around.source.storage.read(key, MAX_MANIFEST)
        except FileNotFoundError:
            raise Superseded from None
        if decode_manifest(data, self._step).attempt != self.manifest.attempt:
            raise Superseded
        return data

    async def copy(self, whole: set[str], shared: Mapping[str, str], finished: Finished) -> None:
        """Bring all but the manifest to the target, durably. Of what a try before this has left there the files `whole`
        stay; `finished` is called with the name of each that has become so.

        `shared` are the folders of the target where files of that name are that may be shared.

        Raises:
            CorruptCheckpointError: bytes here are not what was committed.
            StorageError, FileNotFoundError, FileExistsError: see `Storage`.
        """
        around, target = self._around, self._around.target
        await around.workers.run(lambda: target.begin(self.folder, shared=True))
        there = set(await around.workers.run(target.list, self.folder))
        records = [record for part in self._reader.parts for record in self._reader.shares(part) if record.size]
        whole = {name for name in whole & there if await self._is_whole(name)}
        await self._clear(there - whole)
        try:
            async with asyncio.TaskGroup() as group:
                for record in records:
                    group.create_task(self._copy_part(record, whole, shared, finished))
        except BaseExceptionGroup as errors:
            raise next(leaves(errors)) from None
        for name in self.manifest.records:
            await around.workers.run(self._put_record, name)
        await around.workers.run(target.settle, self.folder)

    async def _copy_part(
        self, record: PartRecord, whole: set[str], shared: Mapping[str, str], finished: Finished
    ) -> None:
        async with self._around.parts:
            files = sorted(set(record.data_files) - whole)
            files = [name for name in files if not (name in shared and await self._share(name, shared[name]))]
            pieces = await self._pieces(record) if files else {}
            for name in files:
                await self._copy_file(name, pieces[name])
                await finished(name)

    async def _is_whole(self, name: str) -> bool:
        return await self._around.workers.run(self._size_there, name) == self.manifest.files[name].size

    def _size_there(self, name: str) -> int:
        file = self._around.target.open(f"{self.folder}/{name}")
        try:
            return file.size
        finally:
            file.close()

    async def _clear(self, files: Iterable[str]) -> None:
        for name in files:
            await self._around.workers.run(self._around.target.delete, f"{self.folder}/{name}")

    async def _share(self, name: str, folder: str) -> bool:
        """Whether the file could be shared with the one in `folder`."""
        try:
            await self._around.workers.run(self._around.target.share, f"{folder}/{name}", f"{self.folder}/{name}")
        except OSError:
            return False
        return True

    def _put_record(self, name: str) -> None:
        try:
            data = self._around.source.storage.read(f"{self.folder}/{name}", self.manifest.files[name].size)
        except FileNotFoundError:
            raise CorruptCheckpointError(f"{name} of step {self._step} is missing", step=self._step) from None
        check_record_bytes(data, name, self.manifest)
        self._around.target.put(f"{self.folder}/{name}", data)

    def _open(self, name: str) -> ReadableFile:
        try:
            file = self._around.source.storage.open(f"{self.folder}/{name}")
        except FileNotFoundError:
            raise CorruptCheckpointError(f"{name} of step {self._step} is missing", step=self._step) from None
        if file.size != self.manifest.files[name].size:
            file.close()
            raise CorruptCheckpointError(f"{name} of step {self._step} has another size now", step=self._step)
        return file

    async def _pieces(self, record: PartRecord) -> dict[str, list[Piece]]:
        """By file, what the checkpoint has in it."""
        if record.file is not None:
            size = record.chunk_size
            return {record.file: [Piece(i * size, c.stored, c.digest) for i, c in enumerate(record.chunks)]}
        workers = self._around.workers
        with ExitStack() as stack:
            files = [_Listening(await workers.run(self._open, name)) for name in record.data_files]
            for file in files:
                stack.callback(file.close)
            reader, benches = PieceReader(record, files), threading.local()

            def decode(index: int, length: int) -> None:
                reader.read_into(index, allocate(length), benches.__dict__.setdefault("bench", Bench()))

            async with asyncio.TaskGroup() as group:
                for index, length in enumerate(record.lengths):
                    await self._in_slot(group, decode, index, length)
        return {name: list(f.heard.values()) for name, f in zip(record.data_files, files, strict=True)}

    async def _copy_file(self, name: str, pieces: list[Piece]) -> None:
        workers, size = self._around.workers, self.manifest.files[name].size
        source = await workers.run(self._open, name)
        try:
            target = await workers.run(self._around.target.create, f"{self.folder}/{name}", size)
            try:
                async with asyncio.TaskGroup() as group:
                    for stretch in stretches(size, pieces):
                        await self._around.pace(stretch.end - stretch.start)
                        await self._in_slot(group, self._copy_stretch, name, source, target, stretch)
                await workers.run(target.finish)
            except BaseException:
                if not workers.abandoned:  # else a thread may be at it still
                    target.abort()
                raise
        finally:
            if not workers.abandoned:
                source.close()

    def _copy_stretch(self, name: str, source: ReadableFile, target: WritableFile, stretch: Stretch) -> None:
        data = allocate(stretch.end - stretch.start)
        done, piece = source.read_into(stretch.start, data), stretch.piece
        if done != len(data) or (piece is not None and digest(data[: piece.size]) != piece.digest):
            raise CorruptCheckpointError(
                f"{name} of step {self._step} is not what was committed, at {stretch.start}", step=self._step
            )
        target.write_at(stretch.start, data)

    async def _in_slot(self, group: asyncio.TaskGroup, work: Callable[..., None], *args: Any) -> None:
        """Let a thread do `work` in `group`, as soon as there is a slot."""
        slots = self._around.slots
        await slots.acquire()

        async def run() -> None:
            try:
                await self._around.workers.run(work, *args)
            finally:
                slots.release()

        group.create_task(run())
