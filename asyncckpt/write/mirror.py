"""The mirror: what is committed here is copied to another storage, newest first, by tasks and threads of its own.

Nothing here is waited for by a save: where the mirror fails or hangs, steps wait in a queue, and it is tried again. The
target is owned as a run is, its leftovers are swept and its checkpoints retired by a custody of its own. What was
copied of a step that is still to be mirrored stays, through restarts too: see `Journal`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from asyncckpt.catalog.catalog import Catalog
from asyncckpt.catalog.custody import Custody
from asyncckpt.catalog.ownership import Ownership
from asyncckpt.errors import CheckpointError, ConflictError, CorruptCheckpointError, StorageError
from asyncckpt.format import names
from asyncckpt.format.manifest import Manifest
from asyncckpt.policy.keep import judge
from asyncckpt.policy.records import Record
from asyncckpt.storage.base import Storage
from asyncckpt.write import messages as m
from asyncckpt.write.copying import StepCopy, Superseded, Surroundings
from asyncckpt.write.journal import Journal
from asyncckpt.write.sidecars import Sidecars
from asyncckpt.write.standing import Standing
from asyncckpt.write.workers import Workers

log = logging.getLogger("asyncckpt")
THREADS = 4
_FIRST_WAIT, _LAST_WAIT = 0.5, 60.0
"""Seconds before a mirror that failed is tried again, at first and at most."""
_LOOK = 60.0
"""Seconds that the mirror has at the start to say what it holds."""
_LAST_MOMENT = 2.0
"""Seconds that a mirror which is given up has to end by itself."""


@dataclass(eq=False)
class Job:
    """A step that is committed here and not there. `saves` are those of this service that it is of."""

    step: int
    attempt: str
    sequence: int
    saves: list[int] = field(default_factory=list)

    @property
    def folder(self) -> str:
        return f"{names.step_name(self.step)}/{self.attempt}"


class Pace:
    """At most `rate` bytes a second, but for what goes first."""

    def __init__(self, rate: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._clock = rate, clock
        self._free = 0.0

    def reserve(self, size: int) -> float:
        """How many seconds from now `size` bytes may go."""
        if self._rate is None:
            return 0.0
        now = self._clock()
        start = max(now, self._free)
        self._free = start + size / self._rate
        return start - now


class Mirror:
    """All methods run on the service's event loop. `own` owns the target, on a thread, if nobody else does;
    `landed` is called when a step need not be kept for the mirror any more."""

    def __init__(
        self,
        to: m.MirrorTo,
        source: Catalog,
        target: Storage,
        own: Callable[[threading.Event], Ownership],
        nice: int,
        reply: Callable[[m.Reply], None],
        landed: Callable[[], None],
    ) -> None:
        self._to, self._source, self._target = to, source, target
        self._own, self._reply, self._landed = own, reply, landed
        self._workers = Workers(THREADS, nice, "asyncckpt-mirror")
        slots, parts = asyncio.Semaphore(THREADS), asyncio.Semaphore(THREADS)
        self._around = Surroundings(source, target, self._workers, self._take, slots, parts)
        self._sidecars = Sidecars(source, target)
        self._pace = Pace(to.bandwidth)
        self.known = 0
        """Up to this sequence, what the target has is the past of this run."""
        self._ours: set[str] = set()
        self._jobs: dict[int, Job] = {}
        self._damaged: dict[int, str] = {}
        """By step, the attempt that can't be mirrored, for its bytes here are not what was committed."""
        self._lock: Ownership | None = None
        self._custody: Custody | None = None
        self._journal: Journal | None = None
        self._custody_lock = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._over = threading.Event()
        self._wake = asyncio.Event()
        self._idle = False
        self._standing = Standing(to, self._workers, reply, lambda: len(self._jobs))
        self._alone: Callable[[], bool] | None = None

    # What the service asks

    async def look(self) -> int:
        """The highest sequence number that the target knows of.

        Raises:
            CheckpointError: it can't be read, or not in time.
        """
        seconds = min(_LOOK, self._to.timeout)
        looking = asyncio.ensure_future(self._workers.run(Custody, self._target, None))
        await asyncio.wait([looking], timeout=seconds)
        if not looking.done():
            raise StorageError(f"{self._to.url} does not answer within {seconds:g} s", retryable=True)
        return looking.result().sequence

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    def committed(self, manifest: Manifest, save: int) -> None:
        """A step is committed here."""
        self._take_out(manifest.step)
        self._jobs[manifest.step] = job = Job(manifest.step, manifest.attempt, manifest.sequence, [save])
        if self._custody is not None:
            self._custody.active.add(job.folder)
        self.noted()

    def noted(self) -> None:
        """There is something to do: a step, or notes or rewinds that have changed."""
        if self._idle:
            self._standing.moves()
        self._idle = False
        self._wake.set()
        self._standing.tell()

    def lacks(self, record: Record) -> bool:
        """Whether a checkpoint of here is still to be mirrored, as far as is known. Safe to call from any thread."""
        if self._custody is None:
            return record.attempt not in self._ours
        job = self._jobs.get(record.step)
        return (job is not None and job.attempt == record.attempt) or self._damaged.get(record.step) == record.attempt

    async def delete(self, step: int) -> bool:
        """Make `step` not exist there; whether it was there.

        Raises:
            CheckpointBusyError, StorageError, CorruptCheckpointError: see `Custody.delete`.
        """
        custody = self._custody
        if custody is None:
            raise StorageError(
                f"{self._to.url} can't be changed now: {self._standing.error or 'it is not reached yet'}"
            )
        self._take_out(step)
        async with self._custody_lock:
            there = await self._workers.run(custody.catalog.exists, step)
            await self._workers.run(custody.delete, step)
        return there

    def _take_out(self, step: int) -> None:
        """What is to be mirrored of `step` need not be any more."""
        self._damaged.pop(step, None)
        job = self._jobs.pop(step, None)
        if job is not None:
            if self._custody is not None:
                self._custody.active.discard(job.folder)
            self._tell_of(job, passed_over=True)

    async def drained(self, save: int = 0) -> None:
        """Return when all that is committed is there or passed over, or `save` is, if one is named.

        Raises:
            Exception: what the mirror fails of, for good or for `timeout` seconds; or it hangs.
        """
        await self._standing.until(
            lambda: self._idle if save == 0 else all(save not in job.saves for job in self._jobs.values())
        )

    async def finish(self, alone: Callable[[], bool]) -> None:
        """Mirror what there is, unless the mirror fails or another service comes to own the run: that will go on.

        `alone` tells that none does; it is called on a thread.
        """
        self._alone = alone
        try:
            await self.drained()
        except Exception as error:
            log.warning(
                "%s: %d steps are not mirrored; the next start goes on: %s", self._to.url, len(self._jobs), error
            )
        await self.close()

    async def close(self) -> None:
        """End, whatever is under way."""
        self._over.set()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task], timeout=_LAST_MOMENT)
        self._workers.abandoned = True
        self._workers.close()
        if self._lock is None:
            return
        if self._task is None or self._task.done():
            self._lock.release()
        else:  # what hangs may write yet
            threading.Thread(target=self._release_later, args=[self._lock], daemon=True).start()

    def _release_later(self, lock: Ownership) -> None:
        self._workers.join()
        lock.release()

    # The task

    async def _run(self) -> None:
        wait = _FIRST_WAIT
        while True:
            self._wake.clear()
            try:
                if self._custody is None:
                    await self._come_to_own()
                await self._mirror_all()
            except Exception as error:
                self._standing.fails(error)
                await self._standing.rest(wait * random.uniform(0.5, 1.0))
                wait = _FIRST_WAIT if isinstance(error, ConflictError) else min(2 * wait, _LAST_WAIT)
            else:
                wait = _FIRST_WAIT
                self._standing.recovers()
                self._idle = not self._wake.is_set()
                self._standing.tell()
                await self._wake.wait()

    async def _take(self, size: int) -> None:
        """Wait until `size` bytes may go."""
        delay = self._pace.reserve(size)
        self._standing.moves(delay)
        if delay > 0:
            await asyncio.sleep(delay)
        self._standing.took(size)

    # Owning the target

    async def _come_to_own(self) -> None:
        """Own the target, and find out what it lacks.

        Raises:
            ConflictError: another writer owns it, or has committed there what this run does not know of.
        """
        try:
            lock = await self._workers.run(self._own, self._over)
        except ConflictError as error:
            raise ConflictError(
                f"{self._to.url} is being written by another process (pid {error.pid or 'unknown'}). If it does not "
                "end by itself, stop it, or give this run a mirror of its own.",
                pid=error.pid,
            ) from None
        try:
            custody = await self._workers.run(Custody, self._target, self._to.keep, lock.check)
            jobs = await self._workers.run(self._lacking, custody)
            journal = await self._workers.run(Journal, self._source.storage, self._to.url)
            for job in jobs:
                self._jobs.setdefault(job.step, job)
            custody.active.update(job.folder for job in self._jobs.values())
            await self._workers.run(custody.sweep)
        except BaseException:
            lock.release()
            raise
        self._lock, self._custody, self._journal = lock, custody, journal

    def _lacking(self, custody: Custody) -> list[Job]:
        there = {}
        for step in custody.catalog.committed():
            manifest = _manifest(custody.catalog, step)
            if manifest is None:
                continue
            there[step] = manifest.attempt
            if manifest.sequence > self.known and manifest.attempt not in self._ours:
                raise ConflictError(
                    f"another writer has committed step {step} in {self._to.url} since this run was opened, so nothing "
                    "more is mirrored there. Restart to go on from the newest there, or give another mirror."
                )
        found = [_manifest(self._source, step) for step in self._source.committed()]
        return [Job(x.step, x.attempt, x.sequence) for x in found if x is not None and there.get(x.step) != x.attempt]

    # Steps

    async def _mirror_all(self) -> None:
        assert self._custody is not None
        async with self._custody_lock:
            await self._workers.run(self._sidecars.copy)
        while self._jobs:
            if self._alone is not None and not await self._workers.run(self._alone):
                log.info("%s: the writer that has come to own the run mirrors on", self._to.url)
                self._jobs.clear()
                return
            await self._pass_over(self._custody)
            if self._jobs:
                await self._mirror(self._custody, max(self._jobs.values(), key=lambda job: job.sequence))
                self._standing.recovers()

    async def _pass_over(self, custody: Custody) -> None:
        """Take what retention would delete there out of the queue."""
        if self._to.keep is None:
            return
        jobs = dict(self._jobs)

        def kept() -> set[int]:
            records = {record.step: record for record in custody.catalog.records()}
            for step in jobs:
                with contextlib.suppress(FileNotFoundError):
                    records[step] = self._source.record(step)
            return {step for step, verdict in judge(records.values(), self._to.keep).items() if verdict.stays}

        stay = await self._workers.run(kept)
        for step, job in jobs.items():
            if step not in stay:
                await self._pass(custody, job)

    async def _pass(self, custody: Custody, job: Job) -> None:
        """`job` need not be done."""
        custody.active.discard(job.folder)
        if self._forget(job):
            self._tell_of(job, passed_over=True)
        assert self._journal is not None
        async with self._custody_lock:
            if await self._workers.run(self._journal.drop, job.folder):
                await self._workers.run(custody.sweep_step, job.step)

    async def _mirror(self, custody: Custody, job: Job) -> None:
        journal = self._journal
        assert journal is not None
        writing = asyncio.Lock()

        async def finished(name: str) -> None:
            async with writing:
                await self._workers.run(journal.add, job.folder, name)

        try:
            copy = await self._workers.run(StepCopy, self._around, job.step, job.attempt)
            try:
                shared = await self._workers.run(_shareable, custody.catalog, copy.manifest)
                await copy.copy(journal.whole(job.folder), shared, finished)
                data = await self._workers.run(copy.manifest_bytes)
            finally:
                if not self._workers.abandoned:
                    copy.close()
        except Superseded:
            await self._pass(custody, job)
            return
        except CorruptCheckpointError as error:
            self._cannot(custody, job, error)
            return
        except (FileNotFoundError, FileExistsError) as error:
            raise StorageError(f"{self._to.url} has changed meanwhile: {error}", retryable=True) from error
        if not await self._commit(custody, job, copy.manifest, data):
            await self._pass(custody, job)

    async def _commit(self, custody: Custody, job: Job, manifest: Manifest, data: bytes) -> bool:
        """False: it was deleted meanwhile, or saved again."""
        assert self._journal is not None
        async with self._custody_lock:
            if self._jobs.get(job.step) is not job:
                return False
            replaced = await self._workers.run(self._publish, custody, manifest, data)
            custody.active.discard(job.folder)
            self._forget(job)
            self._standing.has(job.step)
            self._tell_of(job)
            await self._workers.run(self._journal.drop, job.folder)
            try:
                await self._workers.run(custody.after_commit, manifest, replaced)
            except (CheckpointError, OSError) as error:
                log.warning("retention in %s: %s", self._to.url, error)
        return True

    def _publish(self, custody: Custody, manifest: Manifest, data: bytes) -> str | None:
        """Commit it there; returns the attempt that it takes the place of."""
        step = manifest.step
        self._sidecars.copy_rewinds()
        replaced = custody.attempt_of(step)
        key = f"{names.step_name(step)}/{names.MANIFEST}"
        self._ours.add(manifest.attempt)
        self._target.publish(key, data, replace=custody.catalog.exists(step))
        custody.verified.add(step)
        self._sidecars.copy_notes_of(step)
        return replaced

    def _cannot(self, custody: Custody, job: Job, error: CorruptCheckpointError) -> None:
        told = f"step {job.step} is damaged in {self._source.storage.url}, and not mirrored: {error}"
        log.error("%s", told)
        custody.active.discard(job.folder)
        if self._forget(job):
            self._damaged[job.step] = job.attempt
            self._tell_of(job, fault=m.Fault.of(CorruptCheckpointError(told, step=job.step)))

    def _forget(self, job: Job) -> bool:
        """Take it from the queue; False where it has been already, or a newer one is in its place."""
        if self._jobs.get(job.step) is not job:
            return False
        del self._jobs[job.step]
        return True

    def _tell_of(self, job: Job, *, passed_over: bool = False, fault: m.Fault | None = None) -> None:
        if passed_over:
            self._standing.passes_over()
        for save in job.saves or [0]:
            self._reply(m.Mirrored(save, job.step, passed_over, fault))
        self._standing.tell()
        if fault is None and self._alone is None:
            self._landed()


def _manifest(catalog: Catalog, step: int) -> Manifest | None:
    """None where it is damaged, or gone."""
    try:
        return catalog.manifest(step)
    except (CorruptCheckpointError, FileNotFoundError):
        return None


def _shareable(catalog: Catalog, manifest: Manifest) -> dict[str, str]:
    """By name, where coded files of `manifest` are already: in an earlier checkpoint, which uses as much of each.

    A later one may use less, and what nothing uses was never verified.
    """
    wanted = {name for name in manifest.files if names.coded_of(name) is not None}
    found: dict[str, str] = {}
    if not wanted:
        return found
    for step in catalog.committed():
        other = _manifest(catalog, step)
        if other is not None and other.sequence < manifest.sequence:
            same = {name for name in wanted & other.files.keys() if other.files[name].size == manifest.files[name].size}
            found |= dict.fromkeys(same, f"{names.step_name(step)}/{other.attempt}")
    return found
