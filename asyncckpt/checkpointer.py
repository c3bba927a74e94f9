"""The face of the library: `Checkpointer`."""

from __future__ import annotations

import asyncio
import atexit
import errno
import logging
import os
import sys
import time
import warnings
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from asyncckpt import arguments, progress, signals
from asyncckpt.company import Request, company
from asyncckpt.distributed.offers import Move
from asyncckpt.errors import CheckpointError, StorageError, TornSnapshotError
from asyncckpt.fetching import Loaded, Wish
from asyncckpt.handle import SaveHandle
from asyncckpt.link import Options
from asyncckpt.policy.auto import Auto
from asyncckpt.policy.cadence import Cadence
from asyncckpt.policy.codec import Codec
from asyncckpt.policy.codec import Name as CodecName
from asyncckpt.policy.keep import Keep, Policy
from asyncckpt.policy.overlap import OverlapTrial
from asyncckpt.policy.records import Record
from asyncckpt.preemption import Notice, Preemption, Watch, announce, report
from asyncckpt.run import Directory, Run
from asyncckpt.schedule import Schedule
from asyncckpt.session import Session, WhenFull
from asyncckpt.snapshot import fence
from asyncckpt.snapshot.apply import Rename
from asyncckpt.snapshot.describe import Description
from asyncckpt.snapshot.snapshotter import Snapshotter
from asyncckpt.stats import Stats
from asyncckpt.storage.posix import Posix
from asyncckpt.storage.urls import in_this_process_only
from asyncckpt.taken import TakenSteps

log = logging.getLogger("asyncckpt")
_WHEN_FULL = ("wait", "skip", "replace", "raise")
_EXIT_PATIENCE = 600.0
"""Seconds that a process which ends without `close` waits for its saves."""
_open: set[Checkpointer] = set()


class Checkpointer:
    """Saves the state of a training in the background, and brings it back.

    One Checkpointer owns the run in `directory` from its construction until `close`; reading needs no ownership
    (see `asyncckpt.open`). Call it from one thread; handles may be used from any.

    Args:
        directory: where checkpoints are kept; made by the first save, with its parents. Or a URL of an object store:
            "s3://bucket/run", gs://, az://; file:// is a directory, memory:// the memory of this process.
        storage_options: for URLs: keys of obstore, such as {"region": "eu-central-1", "endpoint": ...}, with dicts
            "client_options" and "retry_config". Credentials are found in the environment, or given here; they are
            handed to the writer by its socket, and shown nowhere.
        cadence: when `maybe_save` saves: `Every`, `Auto`, or any object with the method of `Cadence`.
        parts: clocks of single parts, such as {"model": Every(steps=100), "optimizer": Every(steps=1000)}. The others
            go by `cadence`; without one, with every save. A part that is due takes along those that were saved since
            its own last save, so that complete checkpoints come as often as the slowest clock says. A part whose last
            save came to nothing, or that was never saved nor restored, goes with the next one.
        preempt: what counts as a notice to leave, such as `Preemption()`, which installs signal handlers; without it,
            no signal is touched. See `preempted`.
        keep: which checkpoints stay; without it, all. Or a function of your own: from the records of the run, oldest
            first, the steps that may go. It runs in this process, on a thread of the library, after a commit. Where
            it raises, or this process is gone, nothing is deleted; its error counts as that of a failed save.
        export: parts that are saved once more, with their floating tensors cast: {"model": "bf16"} (or "fp16", "fp32")
            adds a part "model-bf16", to be read by `load` or from its file. `restore` never takes it.
        mirror: a second place, such as s3://bucket/run or a directory on a file server, to which what is committed is
            copied in the background; no save waits for it. `restore` takes from it what is newer there, or here absent
            or damaged.
        mirror_keep: which checkpoints stay there; without it, all. Steps that it would not keep are not copied.
        mirror_bandwidth: the most bytes a second that are sent there.
        mirror_required: no policy deletes a step here before it is mirrored.
        mirror_timeout: seconds without any success after which whoever waits for the mirror is told so; a close of the
            Checkpointer, which waits until all is mirrored, too.
        mirror_options: `storage_options` of a mirror that is a URL.
        max_in_flight: snapshots that may be staged and not yet committed; each takes the size of the state in memory.
        when_full: what `save` does when there are that many: "wait" for a place, "skip" this save, "replace" the
            newest that waits for the writer, "raise" `QueueFullError`.
        writer: "process", which finishes what is staged even if this process is killed, or "thread". Where there is
            no memfd (not Linux), and for memory://, it is always a thread.
        codec: how the state is stored, always without loss. "raw": safetensors files that any reader opens, at the
            speed of the disk. "incremental": what has not changed since the last save is not written again. "zstd":
            that, and the rest smaller (bf16 weights to about two thirds), for time of the cores in the background.
            "delta": that, and what has changed as its difference from the last save, which is smallest when saves
            are few steps apart. "auto": "raw" or "zstd", whichever is committed sooner with the disk and the cores
            that there are.
        max_chain: with "delta", the most saves in a row that may hang on one another; reading the last one back takes
            so many times longer.
        codec_cores: the most cores that coding takes at a time; without it, those that this process may use.
        overlap: True copies what only an optimizer's step changes during the next forward and backward pass, and
            holds the step back until that is done; False copies all before `save` returns; "auto" tries both on the
            first saves and keeps what costs less.
        overlap_parts: parts to be copied late as well, although no optimizer owns them. Call `fence()` before you
            change them.
        on_error: what becomes of a failed save at the next one: "raise" its error, or "warn". `wait_until_flushed`
            and `close` raise it either way, unless the handle's `result` already has.
        check_finite: let the writer look for NaN and inf in all floating tensors (not complex ones) while it writes
            them. A warning names them, `records` says `finite`, and the newest finite checkpoint stays whatever
            `keep` says. A tensor that is meant to hold inf, such as a mask, counts too.
        memory_limit: bytes that snapshots may take beside the training; without it, what the system has.
        lock_timeout: seconds to wait for another writer of this run, such as that of a killed trainer finishing.
        rank_timeout: with several ranks, seconds that they wait for each other, and within which a save must be written
            by all; what is not done by all in time is done by none.

    In a job of several ranks (torch's default process group is initialized) all of them make the Checkpointer, and
    call `save`, `maybe_save`, `restore` and `delete` in the same order with the same steps; `preempt` all give or none.

    Raises:
        ValueError, TypeError: an argument that makes no sense.
        ConflictError: another writer owns the run, still after `lock_timeout` seconds.
        StorageError: the directory can't be used, or the writer can't be started.
        CheckpointError: signals can't be listened to: there are too many open files, or threads.
    """

    def __init__(
        self,
        directory: Directory,
        *,
        storage_options: Mapping[str, Any] | None = None,
        cadence: Cadence | Auto | None = None,
        parts: Mapping[str, Cadence] | None = None,
        preempt: Preemption | None = None,
        keep: Keep | Policy | None = None,
        export: Mapping[str, str] | None = None,
        mirror: Directory | None = None,
        mirror_keep: Keep | None = None,
        mirror_bandwidth: float | None = None,
        mirror_required: bool = False,
        mirror_timeout: float = 600.0,
        mirror_options: Mapping[str, Any] | None = None,
        max_in_flight: int = 2,
        when_full: WhenFull = "wait",
        writer: Literal["process", "thread"] = "process",
        codec: CodecName = "raw",
        max_chain: int = 8,
        codec_cores: int | None = None,
        overlap: bool | Literal["auto"] = "auto",
        overlap_parts: Collection[str] = (),
        on_error: Literal["raise", "warn"] = "raise",
        check_finite: bool = False,
        memory_limit: int | None = None,
        lock_timeout: float = 120.0,
        rank_timeout: float = 600.0,
        _posix: Posix | None = None,
    ) -> None:
        arguments.check_choice("when_full", when_full, _WHEN_FULL)
        arguments.check_choice("writer", writer, ("process", "thread"))
        arguments.check_codec(codec, max_chain, codec_cores)
        arguments.check_choice("overlap", overlap, (True, False, "auto"))
        arguments.check_choice("check_finite", check_finite, (True, False))
        arguments.check_choice("on_error", on_error, ("raise", "warn"))
        arguments.check_whole("max_in_flight", max_in_flight)
        arguments.check_cadence(cadence)
        clocks = arguments.checked_clocks(parts or {})
        exports = arguments.checked_export(export or {})
        mirroring = arguments.checked_mirror(
            directory, mirror, mirror_keep, mirror_bandwidth, mirror_required, mirror_timeout, mirror_options
        )
        if preempt is not None and not isinstance(preempt, Preemption):
            raise TypeError(f"preempt={preempt!r}: give asyncckpt.Preemption()")
        arguments.check_keep(keep)
        if memory_limit is not None:
            arguments.check_whole("memory_limit", memory_limit)
        if not lock_timeout >= 0:
            raise ValueError(f"lock_timeout={lock_timeout!r}: give seconds, from 0 on")
        if not rank_timeout > 0:
            raise ValueError(f"rank_timeout={rank_timeout!r}: give seconds, more than 0")
        self._when_full, self._on_error = when_full, on_error
        self._run = Run(directory, storage_options, mirror, mirror_options)
        self._pid = os.getpid()
        self._closed = False
        alone = any(in_this_process_only(s.url) for s in (self._run.storage, self._run.mirror) if s is not None)
        process = writer == "process" and hasattr(os, "memfd_create") and not alone
        self._company = company(
            self._run,
            rank_timeout=rank_timeout,
            settings={"when_full": when_full, "on_error": on_error, "max_in_flight": str(max_in_flight)},
            cadence=cadence,
            clocks=clocks,
            preempt=preempt,
            when_full=when_full,
            mirrored=mirror is not None,
        )
        options = Options(
            self._run.storage.url,
            keep,
            lock_timeout,
            process=process,
            check_finite=check_finite,
            codec=Codec(codec, max_chain, codec_cores),
            rank=self._company.rank,
            mirror=mirroring,
            posix=_posix,
            storage=self._run.options,
        )
        self._trial = OverlapTrial() if overlap == "auto" else None
        self._overlap = overlap is True
        self._snapshotter = Snapshotter(overlap_parts, exports)
        self._preempt = preempt
        self._watch = Watch(preempt, self._company.given) if preempt is not None else None
        self._schedule = Schedule(
            cadence,
            self._notice if preempt is not None else None,
            self._trial,
            lambda: self._snapshotter.fenced,
            clocks=clocks,
        )
        self._newest: SaveHandle | None = None
        self._warned: set[BaseException] = set()
        self._metric_missed = False
        try:
            self._session = self._company.open(
                lambda: Session(
                    options,
                    self._snapshotter,
                    self._save_ended,
                    max_in_flight=max_in_flight,
                    memory_limit=memory_limit,
                    ready=self._company.ready,
                )
            )
        except BaseException:
            self._snapshotter.close()
            raise
        try:
            self._taken = TakenSteps(self._run)
            fence.install(self._schedule.meter)
            self._company.listen(self._notice_heard)
            if self._watch is not None:
                self._watch.start()
            _open.add(self)
        except BaseException:
            self._end()
            raise

    def __repr__(self) -> str:
        return f"Checkpointer({self._run.storage.url!r})"

    # Saving

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        *,
        parts: Iterable[str] | None = None,
        metrics: Mapping[str, float] | None = None,
        when_full: WhenFull | None = None,
        overwrite: bool = False,
    ) -> SaveHandle:
        """Snapshot `state` and let it be committed as `step` in the background.

        Args:
            step: from 0 on. Saving a committed step needs `overwrite`; it stays readable until the new one replaces
                it. Free are steps of a branch left by `rewind`, and those that `restore` passed over, unless pinned.
            state: named parts. Values: anything with `state_dict()` and `load_state_dict()`, or nested dicts, lists
                and tuples of tensors, numpy arrays and plain values.
            parts: save only these parts. Unless they are all, such a checkpoint is not complete: retention keeps a
                complete one beside it, and `restore` passes it over without `allow_stale`.
            metrics: numbers to be kept with the checkpoint. One that `keep` goes by and that is not there yet may come
                by `annotate`; until it does, or a later step has it, the checkpoint stays.
            when_full: instead of the Checkpointer's.

        Raises:
            CheckpointError: the error of an earlier save, with `on_error="raise"`. This step is not saved then.
            UnsupportedStateError: something in `state` can't be stored exactly. Nothing was written.
            CheckpointExistsError: `step` is committed or in flight, and `overwrite` is not given.
            QueueFullError: `when_full` is "raise".
            StorageError: there is no room for even one such checkpoint, or the writer can't be started.
        """
        called, begun = time.time(), time.perf_counter()
        self._check_usable()
        notice = self._schedule.notice
        step = arguments.checked_step(step)
        when_full = self._when_full if when_full is None else when_full
        arguments.check_choice("when_full", when_full, _WHEN_FULL)
        numbers = arguments.checked_metrics(metrics or {})
        self._look_for_metric(numbers)
        session = self._session
        chosen = arguments.checked_parts(state, parts)
        handle = SaveHandle(step, session.waiting, () if chosen is None else tuple(n for n in state if n not in chosen))
        replace = False
        saved: list[str] = []

        def describe() -> Description:
            nonlocal replace
            replace = self._taken.may_replace(step, overwrite, session.in_flight)
            what = self._snapshotter.describe(state, chosen)
            saved.extend(name for name in what.parts if name not in what.exports)
            self._check_room(what.size)
            return what

        asked = Request(state, describe, when_full, overwrite, self._failures_to_raise(), self._raise_failures)
        try:
            granted = self._company.grant(session, handle, asked)
            number = self._schedule.save_begins(saved)
            handle.add_done_callback(partial(self._came_to_an_end, number))
            if granted is not None:
                overlap = self._trial.next() if self._trial is not None else self._overlap
                self._newest = handle
                self._taken.add(step)
                self._schedule.meter.save_begins(overlap)
                session.launch(
                    handle,
                    granted.arena,
                    granted.what,
                    called=called,
                    overlap=overlap,
                    replace=replace,
                    metrics=numbers,
                    member=granted.member,
                )
                self._company.launched(handle)
        except BaseException as error:
            session.abandon(handle, error)
            self._company.refused(handle, error)
            raise
        handle.blocked = time.perf_counter() - begun
        if granted is not None:
            if not handle.omitted:
                self._schedule.answer(notice)
            self._schedule.meter.save_returns(handle.blocked)
        session.tally.returned(handle.blocked)
        return handle

    def maybe_save(self, step: int, state: Mapping[str, Any], **options: Any) -> SaveHandle | None:
        """`save`, with the same options, if the cadence or a part's clock says so, or a notice to leave has come.

        Else None. The first call after a notice (of several ranks, to any of them: the first that none has come to yet)
        saves all parts at once, with `when_full="wait"`; an earlier save that
        failed is then told by the log, and raised by `close`.

        Raises:
            ValueError: the Checkpointer has neither a cadence nor clocks nor `preempt`; a clock is that of no part.
        """
        self._check_usable()
        self._schedule.meter.step_ends()
        arguments.check_clocks_fit(self._schedule.clocks.named, state)
        step = arguments.checked_step(step)
        if self._company.call() == "leave":
            self._schedule.give_up()
        move = self._company.agreed(step, self._move(step, state, options))
        if move.parting:
            return self._save_before_leaving(step, state, options, move)
        if not move.save:
            return None
        if move.parts is not None:
            options["parts"] = move.parts
        return self.save(step, state, **options)

    def _move(self, step: int, state: Mapping[str, Any], options: Mapping[str, Any]) -> Move | None:
        """What this process would do, were it alone."""
        due, clocks = self._schedule.decide(step), self._schedule.clocks
        if due is None:
            return None
        if due.reason == "notice":
            newest = self._newest
            if newest is None or newest.step != step or newest.outcome not in ("pending", "committed"):
                return Move(True, parting=True)
            again = bool(newest.omitted) and "parts" not in options
            return Move(again, again=again, parting=True)
        if not clocks.named or "parts" in options:
            return Move(True)
        parts = clocks.chosen(list(state), due.parts, due.others)
        return Move(bool(parts), parts)

    def should_save(self, step: int) -> bool:
        """Whether `maybe_save(step, ...)` would save. Asking changes nothing.

        Raises:
            ValueError: the Checkpointer has neither a cadence nor clocks nor `preempt`.
        """
        self._check_usable()
        step = arguments.checked_step(step)
        return self._company.foresee() or self._schedule.decide(step) is not None

    @property
    def preempted(self) -> bool:
        """Whether a notice to leave has come (see `Preemption`), and a save was begun since: time to break the loop.

        Of several ranks, it becomes true on all in the same `maybe_save`; without a save where they can't agree on one.
        A notice that comes between `maybe_save` and the look at this counts at the next step, which is saved then.
        """
        return self._schedule.answered

    def prepare(self, state: Mapping[str, Any]) -> None:
        """Take the memory for snapshots of `state` and touch it in the background, so that the first save is quick.

        Raises:
            UnsupportedStateError: something in `state` can't be stored exactly.
            CheckpointError: there is too little memory.
        """
        self._check_usable()
        what = self._snapshotter.describe(state)
        self._check_room(what.size)
        self._session.reserve_arenas(what.size)

    def fence(self) -> None:
        """Return when nothing that changes from now on can reach a snapshot.

        Optimizer steps and `load_state_dict` do this of themselves. Call it before changing saved tensors in any
        other way, and before replaying a CUDA graph that contains an optimizer step.
        """
        self._check_usable()
        self._session.join_copies()

    def wait_until_flushed(self, timeout: float | None = None, *, tier: Literal["local", "mirror"] = "local") -> None:
        """Return when every save not skipped or replaced is committed. Shows progress on a terminal.

        With `tier="mirror"`, when all that is committed is on the mirror, too, or was passed over for its retention.

        Raises:
            CheckpointError: a save failed that nobody was told of yet: the oldest, the others in its notes. Of the
                mirror: it fails, for good or for `mirror_timeout` seconds; or a step was damaged before its turn came.
            TimeoutError: saves are still in flight, or not mirrored, after `timeout` seconds.
        """
        self._check_usable()
        arguments.check_choice("tier", tier, ("local", "mirror"))
        begun = time.monotonic()
        with progress.bar(self._session.progress) as update:
            drained = self._session.drain(timeout, update)
        if not drained:
            raise TimeoutError(f"{self._in_flight_text()} still in flight after {timeout:g} s")
        self._raise_failures()
        if tier == "mirror":
            if self._run.mirror is None:
                raise ValueError('tier="mirror": the Checkpointer was given no mirror=')
            left = None if timeout is None else max(0.0, begun + timeout - time.monotonic())
            self._company.once("the mirror to have all", lambda: self._flush_mirror(left))

    def _flush_mirror(self, timeout: float | None) -> None:
        mirror = self._session.mirror
        mirror.wait(timeout=timeout)
        _raise_first(mirror.failures())

    # Restoring

    def restore(
        self,
        state: Mapping[str, Any],
        step: int | None = None,
        *,
        parts: Iterable[str] | None = None,
        strict: bool = True,
        allow_stale: Iterable[str] = (),
        rename: Rename | None = None,
        rewind: bool = False,
    ) -> int | None:
        """Bring `state` to a checkpoint, in place, and return its step.

        All bytes are verified, and everything is held against `state`, before anything is touched. Without `step`
        the newest checkpoint that verifies and has all parts is taken; a warning names damaged ones that were passed
        over. None means that nothing was ever committed. Saves in flight are waited for.

        Args:
            parts: restore only these parts.
            strict: False leaves out keys and parts that only one side has.
            allow_stale: parts that may be older than the rest. A checkpoint that lacks only some of these is taken,
                and they come from the newest one before it that has them.
            rename: new names for the top-level keys of modules and plain dicts: a function, or a mapping of prefixes,
                such as {"_orig_mod.": "", "module.": ""}. Other stateful objects keep their keys.
            rewind: later checkpoints are durably taken out of what `restore` may choose, so that a resume never
                returns to the branch that is left here.

        Raises:
            CheckpointNotFoundError: the step, or a part of it, does not exist; or none there is has all that is needed.
            CorruptCheckpointError: the step is damaged; or, without `step`, all are. It never starts silently anew.
            StateMismatchError: keys are missing, unexpected or of another shape; it names them. Nothing was changed.
        """
        self._check_usable()
        self._session.join_copies()
        self._session.drain(None)
        leave = self._session.rewind if rewind else lambda step: None
        wish = Wish.of_state(state, parts, strict, allow_stale)
        filling = self._company.fetch(state, step, wish, rename, leave)
        if filling is None:
            return None
        loaded = filling.loaded
        self._taken.restored(loaded, whole=parts is None)
        if parts is None and self._company.rank == 0 and self._was_read_here(loaded):
            self._session.trust(loaded.step)
        filling()
        self._schedule.restored(loaded.parts.keys() - loaded.stale.keys(), loaded.stale)
        return loaded.step

    def steps(self) -> list[int]:
        """Committed steps, oldest first, without those of branches that were left by `rewind`."""
        return self._run.steps()

    def latest(self) -> int | None:
        """The newest of `steps()`; None where nothing is committed."""
        return self._run.latest()

    def path(self, step: int) -> Path | str:
        """The folder with the files of `step`: see `Run.path`."""
        return self._run.path(step)

    def verify(self, step: int | None = None) -> int:
        """Read every byte of `step` (the newest by default) and check it; returns the step: see `Run.verify`."""
        self._check_usable()
        step = self._run.verify(step)
        if self._company.rank == 0:
            self._session.trust(step)
        return step

    def delete(self, step: int) -> None:
        """Durably make `step` not exist, then remove its bytes.

        Raises:
            CheckpointNotFoundError: it is not committed.
            CheckpointBusyError: it is pinned, or somebody reads it.
            StorageError: the storage failed.
        """
        self._check_usable()
        step = arguments.checked_step(step)
        self._company.once(f"delete of step {step}", lambda: self._session.delete(step))

    def annotate(self, step: int, metrics: Mapping[str, float]) -> None:
        """Durably add `metrics` to those of a committed step: see `Run.annotate`, which other processes may use."""
        self._check_usable()
        self._run.annotate(step, metrics)
        self._session.noted()

    def pin(self, step: int) -> None:
        """Durably keep a committed step from every policy and from `delete`, until `unpin`: see `Run.pin`."""
        self._check_usable()
        self._run.pin(step)
        self._session.noted()

    def unpin(self, step: int) -> None:
        """Take back `pin`."""
        self._check_usable()
        self._run.unpin(step)
        self._session.noted()

    def records(self) -> list[Record]:
        """What is known of every committed checkpoint, oldest first: see `Run.records`."""
        return self._run.records()

    def stats(self) -> Stats:
        """What has been done so far."""
        session = self._session
        tally = session.tally
        measured = self._schedule.meter.measured
        return Stats(
            saves=tally.saves,
            committed=tally.outcomes["committed"],
            skipped=tally.outcomes["skipped"],
            replaced=tally.outcomes["replaced"],
            failed=tally.outcomes["failed"],
            in_flight=len(session.in_flight),
            blocked=tally.blocked,
            blocked_last=tally.blocked_last,
            blocked_max=tally.blocked_max,
            fenced=self._snapshotter.fenced,
            bytes_committed=tally.bytes_committed,
            seconds_to_committed=tally.seconds_to_committed,
            bytes_per_second=tally.bytes_per_second,
            step_seconds=measured.step,
            save_tax=measured.tax,
            interval=self._schedule.interval,
            arena_bytes=session.arena_bytes,
            overlap=self._trial.choice if self._trial is not None else self._overlap,
            codec=tally.codec,
            rates=tally.rates,
            direct_io=tally.direct_io,
            writer="process" if session.options.process else "thread",
            writer_pid=session.writer_pid,
            mirror=session.mirror.stats,
        )

    # Leaving

    def close(self) -> None:
        """Wait until every save is over, and mirrored if there is a mirror; end the writer, and give up the run.

        A second call does nothing. What the mirror lacks, the next Checkpointer of this run goes on with.

        Raises:
            CheckpointError: a save failed that nobody was told of yet; or the mirror fails: see `wait_until_flushed`.
        """
        if self._closed:
            return
        self._check_usable()
        try:
            self.wait_until_flushed()
            self._flush_mirror(None)
        finally:
            self._end()
        self._raise_failures()  # of the policy, after the last commit

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except CheckpointError as failure:  # the error under way is the one to tell; this one must not be lost
            log.error("while leaving: %s", failure)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await asyncio.to_thread(self.__exit__, kind, error, traceback)
        finally:
            signals.settle()

    def _end(self) -> None:
        self._closed = True
        _open.discard(self)
        if self._watch is not None:
            self._watch.close()
        self._session.close()
        self._company.close()
        self._snapshotter.close()

    def _leave(self) -> None:
        """The process ends, and `close` was not called: drain, and say on stderr what could not be saved."""
        self._closed = True  # another thread may go on saving, for ever
        try:
            if not self._session.drain(_EXIT_PATIENCE):
                print(f"asyncckpt: {self!r}: {self._in_flight_text()} not committed at exit", file=sys.stderr)
            for error in self._session.failures(take=True):
                print(f"asyncckpt: {self!r}: {error}", file=sys.stderr)
            try:
                self._flush_mirror(_EXIT_PATIENCE)
            except (CheckpointError, OSError) as error:
                print(f"asyncckpt: {self!r}: {error}", file=sys.stderr)
        finally:
            self._end()

    # Inside

    def _check_usable(self) -> None:
        if os.getpid() != self._pid:
            raise CheckpointError(
                f"{self!r} belongs to process {self._pid}, which forked this one. Make a Checkpointer after the fork."
            )
        if self._closed:
            raise CheckpointError(f"{self!r} is closed")

    def _failures_to_raise(self) -> list[BaseException]:
        """What failed since the last save and is to be raised; else warn of it. A torn snapshot has warned already."""
        failed = [e for e in self._session.failures(take=False) if not isinstance(e, TornSnapshotError)]
        if not failed:
            return []
        if self._schedule.notice is not None:  # what can be saved yet is worth more than an error: `close` raises it
            log.error("a save failed: %s", failed[0])
            return []
        if self._on_error == "raise":
            return failed
        for error in failed:
            if error not in self._warned:
                self._warned.add(error)
                warnings.warn(f"a save failed: {error}", RuntimeWarning, stacklevel=3)
        return []

    def _raise_failures(self) -> None:
        _raise_first(self._session.failures(take=True))

    def _was_read_here(self, loaded: Loaded) -> bool:
        """Whether all of it came from the run itself. Of several ranks, others may have read the mirror's."""
        return loaded.origin == self._run.storage.url and (self._company.alone or self._run.mirror is None)

    def _notice(self) -> Notice | None:
        """The one that is to be answered, of this process or of all ranks."""
        return self._company.notice(None if self._watch is None else self._watch.notice)

    def _notice_heard(self, notice: Notice) -> None:
        """There is one, here or at another rank. Called once, on a thread of the library."""
        assert self._preempt is not None
        session, step = self._session, self._schedule.meter.measured.step
        announce(
            notice,
            self._preempt.grace,
            step,
            session.tally.seconds_to_committed,
            len(session.in_flight),
        )
        session.hurry()

    def _save_before_leaving(
        self, step: int, state: Mapping[str, Any], options: dict[str, Any], move: Move
    ) -> SaveHandle | None:
        notice = self._schedule.notice
        assert self._preempt is not None and notice is not None
        newest = self._newest
        if move.save:
            again = {"overwrite": True} if move.again else {}
            newest = self.save(step, state, **{**options, "when_full": "wait", **again})
        self._schedule.answer(notice)
        if newest is not None:
            newest.add_done_callback(partial(report, notice, self._preempt.grace))
        return newest

    def _look_for_metric(self, metrics: Mapping[str, float]) -> None:
        """Say once that a save lacks the metric that retention goes by."""
        keep = self._session.options.keep
        if self._metric_missed or not isinstance(keep, Keep) or keep.metric is None or keep.metric in metrics:
            return
        self._metric_missed = True
        log.warning(
            "keep= goes by the metric %r, which this save lacks (it has: %s). Checkpoints stay until it comes, by "
            "annotate, or a later one has it.",
            keep.metric,
            ", ".join(metrics) or "none",
        )

    def _check_room(self, size: int) -> None:
        """Before the first arena is taken: one checkpoint must fit on the disk."""
        if not self._session.untouched:
            return
        free = self._run.storage.free_bytes()
        if free is not None and free < size:
            raise StorageError(
                f"a checkpoint takes {size} bytes, and {self._run.storage.url} has {free} free. Make room, or save "
                "fewer parts.",
                retryable=True,
                errno=errno.ENOSPC,
            )

    def _in_flight_text(self) -> str:
        steps = sorted(handle.step for handle in self._session.in_flight)
        return f"step{'s' if len(steps) != 1 else ''} {', '.join(map(str, steps))}"

    def _came_to_an_end(self, number: int, handle: SaveHandle) -> None:
        if handle.outcome == "committed":
            self._taken.committed(handle.step)
        else:
            self._schedule.clocks.came_to_nothing(number)

    def _save_ended(self, handle: SaveHandle) -> None:
        self._company.ended(handle)
        if handle is self._newest:
            self._schedule.meter.save_ends(committed=handle.outcome == "committed")


def _raise_first(failed: list[BaseException]) -> None:
    if failed:
        for other in failed[1:]:
            failed[0].add_note(f"also: {other}")
        raise failed[0]


@atexit.register
def _leave_all() -> None:
    for checkpointer in list(_open):
        checkpointer._leave()


os.register_at_fork(after_in_child=_open.clear)
