"""The share of one rank in a save of several, and the decision.

Each rank's writer makes its files durable, then lets its prepare record appear, whole and durable. Rank 0's writer
alone decides: when the records of all ranks are in the storage it publishes the manifest; when they are not within the
patience it never does. The storage is the truth, so that neither a trainer nor a connection between ranks is needed
for a commit. That somebody calls `Look` only makes the writers look sooner.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import msgspec

from asyncckpt.catalog.catalog import Catalog
from asyncckpt.errors import CheckpointNotFoundError, RankError
from asyncckpt.format import names
from asyncckpt.format.manifest import MAX_RECORD, FileRecord, PartRecord, digest
from asyncckpt.format.ranks import RankRecord, SharePart, StoredShard, encode_rank_record, prepared
from asyncckpt.policy.codec import Name
from asyncckpt.storage.base import Storage
from asyncckpt.write.bases import Base, BaseGone
from asyncckpt.write.coding import Coding
from asyncckpt.write.messages import Member
from asyncckpt.write.parts import WrittenPart
from asyncckpt.write.pipeline import Attempt, DroppedSave, Prepared, Save, leaves
from asyncckpt.write.workers import Workers

log = logging.getLogger("asyncckpt")
_FIRST_LOOK, _LAST_LOOK = 0.02, 0.5
"""Seconds between looks into the storage while nobody calls `Look`: they become longer by half each time."""
_ORPHANED = 15.0
"""Seconds that a writer whose trainer is dead waits for the other ranks, or three times what its own writing took, if
that is more: their trainers may be dead too, and the next job waits for the run."""


class Deadline:
    """`patience` seconds from now on; fewer once the trainer is dead."""

    def __init__(self, save: Save, patience: float) -> None:
        self._save = save
        self._patience = patience
        self._begun = time.monotonic()
        self._prepared: float | None = None

    def prepared(self) -> None:
        self._prepared = time.monotonic()

    @property
    def left(self) -> float:
        """Seconds; negative where it has passed. A stopped process finds it passed when it goes on."""
        end = self._begun + self._patience
        if self._save.orphaned and self._prepared is not None:
            end = min(end, self._prepared + max(_ORPHANED, 3 * (self._prepared - self._begun)))
        return end - time.monotonic()


class Share(Attempt):
    """What one rank writes. Rank 0's is prepared when all ranks' are."""

    def __init__(
        self,
        save: Save,
        member: Member,
        storage: Storage,
        workers: Workers,
        progress: Callable[[Save], None],
        check_finite: bool,
        codec: Name,
        coding: Coding | None,
        bases: Mapping[str, Base],
        ready: Callable[[], None],
    ) -> None:
        super().__init__(save, member.attempt, storage, workers, progress, check_finite, codec, coding, bases)
        self._rank = member.rank
        self._member, self._ready = member, ready
        self._deadline = Deadline(save, member.patience)

    def last_call(self) -> None:
        """
        Raises:
            RankError: too late: the other ranks have given this save up.
        """
        if self._deadline.left <= 0:
            raise RankError(f"step {self._save.begin.step}: {self._member.patience:g} s had passed before the commit")

    async def prepare(self) -> Prepared:
        try:
            return await super().prepare()
        except BaseExceptionGroup as group:
            gone = next((error for error in leaves(group) if isinstance(error, BaseGone)), None)
            if gone is None:
                raise
            log.warning("step %d: %s; writing it once more under new names", self._save.begin.step, gone)
        await self._workers.run(self._clear)
        self._bases, self._attempt, self._save.written = {}, names.new_attempt(), 0
        return await super().prepare()

    def _clear(self) -> None:
        """Remove what this rank has written."""
        for name in self._storage.list(self.folder):
            found = names.coded_of(name)
            if found is not None and found[1] == self._member.rank:
                self._storage.delete(f"{self.folder}/{name}")

    async def _store_record(self, parts: Mapping[str, WrittenPart]) -> Prepared:
        member, step = self._member, self._save.begin.step
        shares = self._shares(self._records(parts))
        sizes = {name: file.size for part in parts.values() if part.record.files for name, file in part.files.items()}
        record = encode_rank_record(RankRecord(step, member.attempt, member.rank, member.world, shares, sizes))
        await self._workers.run(self._storage.settle, self.folder)
        key = f"{self.folder}/{names.rank_record(member.rank)}"
        await self._workers.run(lambda: self._storage.publish(key, record, replace=False))
        self._deadline.prepared()
        self._ready()
        name = names.rank_record(member.rank)
        own = self._prepared_of({name: FileRecord(len(record), digest(record))}, parts)
        return own if member.rank else replace(await self._gather(), direct=own.direct, parts=own.parts)

    def _prepared(self, records: dict[int, bytes]) -> Prepared:
        """What the records vouch for, themselves included.

        Raises:
            CorruptCheckpointError: a record is damaged, or of another save.
        """
        member, step = self._member, self._save.begin.step
        files: dict[str, FileRecord] = {}
        nonfinite: dict[str, list[str]] | None = {}
        shared: set[str] = set()
        for rank, data in sorted(records.items()):
            record = prepared(data, step, member.attempt, rank, member.world)
            files |= {names.rank_record(rank): FileRecord(len(data), digest(data)), **record.files()}
            shared |= {file.name for part in record.parts.values() for file in part.files if file.uses}
            if record.nonfinite is None:
                nonfinite = None
            elif nonfinite is not None:
                for part, found in record.nonfinite.items():
                    nonfinite[part] = nonfinite.get(part, []) + found
        written = sum(file.size for name, file in files.items() if name not in shared)
        return Prepared(member.attempt, dict(sorted(files.items())), False, written, {}, nonfinite)

    def _shares(self, parts: dict[str, PartRecord]) -> dict[str, SharePart]:
        seal = self._save.seal
        assert seal is not None
        memory, end = self._save.memory, seal.offset + seal.size
        shards = msgspec.json.decode(memory[end : end + seal.shares], type=dict[str, dict[str, StoredShard]])
        trees = msgspec.json.decode(memory[seal.offset : end], type=dict[str, msgspec.Raw])
        return {
            name: SharePart(**msgspec.structs.asdict(part), same=name not in trees, shards=shards.get(name, {}))
            for name, part in parts.items()
        }

    async def _gather(self) -> Prepared:
        """What all ranks have prepared, once they have, and all names are durable.

        Raises:
            RankError: some were not in time.
            CorruptCheckpointError: a record is damaged, or of another save.
        """
        missing = set(range(self._member.world))
        records: dict[int, bytes] = {}
        pause = _FIRST_LOOK
        while True:
            for rank, found in (await self._workers.run(self._look, missing)).items():
                missing.remove(rank)
                records[rank] = found
            if not missing:
                whole = await self._workers.run(self._prepared, records)
                await self._workers.run(self._storage.settle, self.folder)
                return whole
            if self._deadline.left <= 0:
                raise RankError(self._late(sorted(missing)), rank=min(missing))
            await self._save.rest(min(pause, max(self._deadline.left, 0)))
            pause = min(pause * 1.5, _LAST_LOOK)

    def _look(self, ranks: set[int]) -> dict[int, bytes]:
        present = set(self._storage.list(self.folder))
        found = {}
        for rank in ranks:
            name = names.rank_record(rank)
            if name in present:
                found[rank] = self._storage.read(f"{self.folder}/{name}", MAX_RECORD)
        return found

    def _late(self, ranks: list[int]) -> str:
        whom = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:10]))}"
        return (
            f"step {self._save.begin.step} is not committed: {whom} had not written all within "
            f"{self._member.patience:g} s. Is it dead, stopped, or its storage slow? The next save is tried anew."
        )

    async def decided(self) -> None:
        """Return when rank 0's writer has committed the save.

        Raises:
            DroppedSave: nobody waits for the answer any more.
            RankError: it can't be committed any more, or nothing is known of it.
        """
        step, pause = self._save.begin.step, _FIRST_LOOK
        grace = max(2.0, self._member.patience / 10)
        catalog = Catalog(self._storage)
        while True:
            if self._save.committed or await self._workers.run(self._is_published, catalog):
                return
            if self._save.orphaned:
                raise DroppedSave
            if self._deadline.left <= -grace:
                raise RankError(
                    f"step {step} is written by this rank, and rank 0 has not committed it within "
                    f"{self._member.patience:g} s. Is rank 0 dead or stopped? The next save is tried anew.",
                    rank=0,
                )
            await self._save.rest(pause)
            pause = min(pause * 1.5, _LAST_LOOK)

    def _is_published(self, catalog: Catalog) -> bool:
        try:
            return catalog.manifest(self._save.begin.step).attempt == self._member.attempt
        except CheckpointNotFoundError:
            return False
