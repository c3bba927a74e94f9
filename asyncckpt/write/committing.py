"""One save after the other: attempts at writing it, the manifest, and what the next save may hang on."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from errno import EIO
from functools import partial

from asyncckpt.catalog.custody import Custody
from asyncckpt.errors import CheckpointError, StorageError
from asyncckpt.format import names
from asyncckpt.format.manifest import Manifest
from asyncckpt.policy.codec import Codec, Name, Rates, choose
from asyncckpt.storage.base import Storage
from asyncckpt.storage.local import LocalStorage
from asyncckpt.write import messages as m
from asyncckpt.write.bases import Base, BaseGone
from asyncckpt.write.coding import Coding
from asyncckpt.write.pipeline import Attempt, Prepared, Save, leaves
from asyncckpt.write.ranks import Share
from asyncckpt.write.workers import Workers, available_cores

log = logging.getLogger("asyncckpt")
_NAMED = 5
"""Tensors of a part that a message names."""

Commit = tuple[Manifest, str | None, m.Committed]
"""What was published, the attempt whose place it has taken, and the answer to the trainer."""


class Committer:
    """Of one run, opened by `open_`. `custody_of` gives the custody of it, to one at a time.

    `progress` is called as a save is written, `ready` when the share of one of several ranks is durable.
    """

    def __init__(
        self,
        storage: Storage,
        workers: Workers,
        open_: m.Open,
        custody_of: Callable[[], AbstractAsyncContextManager[Custody]],
        progress: Callable[[Save], None],
        ready: Callable[[Save], None],
    ) -> None:
        self._storage, self._workers, self._custody_of = storage, workers, custody_of
        self._progress, self._ready = progress, ready
        self._codec, self._check_finite = open_.codec, open_.check_finite
        self._coding = _coding(open_.codec, workers.count)
        self._using: Name = "raw" if open_.codec.name == "auto" else open_.codec.name
        self._rates = Rates()
        self._bases: dict[str, Base] = {}
        """By part, what was committed last."""

    def close(self) -> None:
        """There will be no more saves."""
        _close(self._bases)

    async def commit(self, save: Save) -> Commit:
        """Write and publish `save`. Where the disk or what it was to hang on fails, once more, under new names.

        Raises:
            DroppedSave: the trainer took it back.
            FileExistsError: this step is committed already, and not to be replaced.
            CheckpointError: it can't be written, or other ranks have not written theirs.
        """
        try:
            return await self._attempt(save, self._bases)
        except (StorageError, BaseGone) as error:
            if save.begin.member is not None or (isinstance(error, StorageError) and error.errno != EIO):
                raise
            log.warning("step %d: %s; writing it once more under new names", save.begin.step, error)
        save.written = 0
        origins, self._bases = self._bases, {}
        try:
            return await self._attempt(save, origins)
        finally:
            _close(origins)

    async def share(self, save: Save, member: m.Member) -> m.Committed:
        """Write the share of a rank that is not the first, and wait for what rank 0's service decides."""
        begun, share, using = time.time(), self._new_share(save, member), self._using
        await self._workers.run(lambda: self._storage.begin(share.folder, shared=True))
        try:
            prepared = await share.prepare()
        except BaseExceptionGroup as group:
            raise next(leaves(group)) from None
        durable = time.time()
        await share.decided()
        await self._learn(share, prepared)
        size, times = sum(file.size for file in prepared.files.values()), (begun, durable, time.time())
        known, written = self._known(), prepared.written
        return m.Committed(save.begin.save, size, *times, prepared.direct, written, using, self._rates, known=known)

    async def _attempt(self, save: Save, origins: Mapping[str, Base]) -> Commit:
        begun, member, using = time.time(), save.begin.member, self._using
        attempt = self._new_attempt(save, origins) if member is None else self._new_share(save, member)
        async with self._custody_of() as custody:
            await self._workers.run(lambda: self._storage.begin(attempt.folder, shared=member is not None))
            custody.active.add(attempt.folder)
        try:
            try:
                prepared = await attempt.prepare()
            except BaseExceptionGroup as group:
                raise next(leaves(group)) from None
            written = time.time()
            async with self._custody_of() as custody:
                await save.until(lambda: True)
                attempt.last_call()
                manifest, replaced = await self._workers.run(self._publish, custody, save, prepared)
        except BaseException:
            custody.active.discard(attempt.folder)
            await guarded("clearing a failed attempt", self._workers.run(custody.sweep_step, save.begin.step))
            raise
        custody.active.discard(attempt.folder)
        await self._learn(attempt, prepared)
        times = begun, written, time.time()
        reply = m.Committed(
            save.begin.save,
            manifest.size,
            *times,
            direct=prepared.direct,
            written=prepared.written,
            codec=using,
            rates=self._rates,
            nonfinite=_listing(prepared.nonfinite),
            known=self._known(),
        )
        return manifest, replaced, reply

    def _publish(self, custody: Custody, save: Save, prepared: Prepared) -> tuple[Manifest, str | None]:
        begin = save.begin
        manifest = Manifest(
            step=begin.step,
            attempt=prepared.attempt,
            sequence=custody.next_sequence(),
            world=1 if begin.member is None else begin.member.world,
            parts=[span.part for span in begin.spans],
            files=prepared.files,
            created=datetime.now(UTC).isoformat(timespec="milliseconds"),
            metrics=dict(begin.metrics),
            omitted=begin.omitted,
            exports=begin.exports,
            finite=prepared.finite(begin.exports),
        )
        return manifest, custody.publish(manifest, replace=begin.replace)

    def _new_attempt(self, save: Save, origins: Mapping[str, Base]) -> Attempt:
        about = self._storage, self._workers, self._progress, self._check_finite
        return Attempt(save, names.new_attempt(), *about, self._using, self._coding, self._bases, origins)

    def _new_share(self, save: Save, member: m.Member) -> Share:
        about = self._storage, self._workers, self._progress, self._check_finite
        return Share(save, member, *about, self._using, self._coding, self._bases, partial(self._ready, save))

    async def _learn(self, attempt: Attempt, prepared: Prepared) -> None:
        """It is committed: what comes next may hang on it, and is stored as it has shown to be best."""
        before = {part: self._bases.pop(part) for part in prepared.parts if part in self._bases}
        for part, written in prepared.parts.items():
            if written.record.coded:
                about = self._storage, attempt.folder, written.record, written.files
                self._bases[part] = await self._workers.run(Base, *about)
        _close(before)
        self._rates = self._rates.then(attempt.meter.rates)
        if self._codec.name == "auto":
            using, self._using = self._using, choose(self._using, self._rates, self._codec.cores or available_cores())
            if using == "raw" != self._using and isinstance(self._storage, LocalStorage):
                await self._workers.run(self._storage.drop_recycled)

    def _known(self) -> dict[str, m.Known]:
        """What the next save may leave out, if nobody has to look at all of it."""
        if self._using == "raw" or self._check_finite:
            return {}
        return {part: base.known for part, base in self._bases.items() if base.known is not None}


async def guarded(what: str, work: Awaitable[None]) -> None:
    """Housekeeping that fails is told, and harms no save."""
    try:
        await work
    except (CheckpointError, OSError) as error:
        log.warning("%s: %s", what, error)


def _coding(codec: Codec, threads: int) -> Coding | None:
    if codec.name == "raw":
        return None
    return Coding.of(threads, codec.cores or available_cores(), codec.max_chain if codec.name == "delta" else 0)


def _close(bases: Mapping[str, Base]) -> None:
    for base in bases.values():
        base.close()


def _listing(nonfinite: Mapping[str, list[str]] | None) -> str:
    """Tensors by part, for a person: the first few of each."""
    parts = []
    for part, tensors in (nonfinite or {}).items():
        if tensors:
            more = f" and {len(tensors) - _NAMED} more" if len(tensors) > _NAMED else ""
            parts.append(f"{part}: {', '.join(tensors[:_NAMED])}{more}")
    return "; ".join(parts)
