"""The trainer's side of one run: its arenas, and the saves in flight.

A save takes a place in the bounded queue and an arena (`admit`), its snapshot is announced to the writer while it
is still being copied (`launch`), and both are free again when the copy is over *and* the writer is done with it.
The writer's replies and its death arrive on a thread of their own; one condition guards all tables.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from asyncckpt.advice import advise
from asyncckpt.errors import CheckpointError, QueueFullError
from asyncckpt.handle import SaveHandle, Timeline
from asyncckpt.link import Link, OfSave, Options, Patience
from asyncckpt.mirrored import MirrorWatch
from asyncckpt.policy.keep import Keep
from asyncckpt.snapshot.arena import Arena, ArenaPool
from asyncckpt.snapshot.describe import Description
from asyncckpt.snapshot.snapshotter import Snapshot, Snapshotter
from asyncckpt.stats import Tally
from asyncckpt.write import messages as m
from asyncckpt.write.client import Writer

log = logging.getLogger("asyncckpt")

WhenFull = Literal["wait", "skip", "replace", "raise"]


@dataclass(eq=False)
class Flight:
    """A save that holds an arena. `copied` and `released` say who is done with it: the snapshot, the writer."""

    number: int
    handle: SaveHandle
    arena: Arena
    size: int
    called: float
    attempt: str = ""
    """Under which it is written, where it is one of several ranks'."""
    copy_begin: float = field(default_factory=time.time)
    copy_end: float = 0.0
    snapshot: Snapshot | None = None
    copied: bool = False
    released: bool = False
    written: int = 0
    error: BaseException | None = None
    asked_to_yield: bool = False


class Session:
    """Opening it starts the writer and waits until that owns the run.

    Raises:
        ConflictError: another writer owns the run, still after `lock_timeout` seconds.
        StorageError: the directory can't be used, or the writer can't be started.
    """

    def __init__(
        self,
        options: Options,
        snapshotter: Snapshotter,
        ended: Callable[[SaveHandle], None],
        *,
        max_in_flight: int,
        memory_limit: int | None,
        ready: Callable[[str], None] = lambda attempt: None,
    ) -> None:
        self.options = options
        self._max_in_flight = max_in_flight
        self.tally = Tally()
        self._snapshotter = snapshotter
        self._on_end, self._on_ready = ended, ready
        self._changed = threading.Condition()
        self._pool = ArenaPool(max_in_flight, memory_limit, shared=options.process)
        self._flights: dict[int, Flight] = {}
        self._numbers = itertools.count(1)
        self._shared: set[int] = set()
        self._known: dict[str, m.Known] = {}
        """Of the save that was committed last, where none has come to nothing since."""
        self._failed: list[SaveHandle] = []
        self._waiters = 0
        self._nonfinite = ""
        self._faults: list[BaseException] = []
        """What failed in the background and was no save."""
        mirror = options.mirror.url if options.mirror is not None and options.rank == 0 else None
        self.mirror = MirrorWatch(mirror, self._changed, lambda: self._link)
        self._link = Link(options, self._changed, self._hear, self._asked, self._writer_ended, self.mirror.hear)
        self._link.ensure()

    # The queue

    def admit(self, handle: SaveHandle, size: int, when_full: WhenFull) -> Arena | None:
        """An arena of `size` bytes, when there is a place in the queue; None: skip this save.

        What is raised between the call of this and the return of `launch` is to be followed by `abandon`.

        Raises:
            QueueFullError: `when_full` is "raise".
            CheckpointError: there is too little memory, however long one waits.
        """
        patience = Patience("a place in the queue", self.options.root)
        while True:
            self._link.ensure()
            with self._changed:
                full = len(self._flights) >= self._max_in_flight
                arena = None if full else self._pool.lease(size, handle)
                if arena is not None:
                    return arena
                if when_full == "skip":
                    return None
                if when_full == "raise":
                    raise QueueFullError(
                        f"{len(self._flights)} saves are in flight and not yet committed. Save less often, raise "
                        "max_in_flight, or choose another when_full."
                    )
                if when_full == "replace":
                    self._ask_to_yield()
                with self.waiting():
                    patience.wait(self._changed)

    def _ask_to_yield(self) -> None:
        """Take back the newest save that the writer has not begun, if it agrees that there is one."""
        waiting = [f for f in self._flights.values() if not f.asked_to_yield and not f.released]
        if len(waiting) > 1:
            waiting[-1].asked_to_yield = True
            self._link.send(m.Drop(waiting[-1].number, queued_only=True))

    def abandon(self, handle: SaveHandle, error: BaseException) -> None:
        """The save has ended by an exception: unless it was launched, and ends in its own way, give its arena back."""
        handle.told = True
        with self._changed:
            if any(flight.handle is handle for flight in self._flights.values()):
                return
            self._pool.take_back(handle)
            self._changed.notify_all()
        handle.finish("failed", error)

    def wait_for_place(self, when_full: WhenFull) -> bool:
        """Wait until there is a place in the queue, or, to skip the save, say whether there is one."""
        patience = Patience("a place in the queue", self.options.root)
        with self.waiting(), self._changed:
            while len(self._flights) >= self._max_in_flight:
                if when_full == "skip":
                    return False
                patience.wait(self._changed)
        return True

    def skipped(self, handle: SaveHandle) -> None:
        handle.finish("skipped")
        with self._changed:
            self.tally.ended(handle)

    def failed(self, handle: SaveHandle, error: BaseException) -> None:
        """A save failed before it was launched."""
        handle.finish("failed", error)
        with self._changed:
            self.tally.ended(handle)
            self._failed.append(handle)

    def launch(
        self,
        handle: SaveHandle,
        arena: Arena,
        what: Description,
        *,
        called: float,
        overlap: bool,
        replace: bool,
        metrics: dict[str, float],
        member: m.Member | None = None,
    ) -> None:
        """Announce the save to the writer and start its copies.

        Whatever is raised in here (by a signal handler of the user's, say), the save is over then.
        """
        flight: Flight | None = None
        try:
            size = sum(size for _, _, size in what.spans)
            attempt = member.attempt if member is not None else ""
            flight = Flight(next(self._numbers), handle, arena, size, called, attempt)
            seal = m.Seal(flight.number, what.trees_offset, len(what.trees) - what.shares, what.shares)
            while True:
                writer = self._link.ensure()
                with self._changed:
                    if writer is self._link.writer:
                        known = {} if self._flights else self._known
                        self._flights[flight.number] = flight
                        # Under this lock: should the writer end before it has the arena, its end takes that back.
                        share = arena.id not in self._shared
                        self._shared.add(arena.id)
                        break
            if share:
                writer.share(arena)
                arena.before_close.append(partial(self._forget, arena.id))
            spans, exports = [m.Span(*span) for span in what.spans], list(what.exports)
            about = handle.step, arena.id, spans, replace, metrics, what.omitted, exports, member
            writer.send(m.Begin(flight.number, *about))
            staged = lambda upto, hashed: writer.send(m.Staged(flight.number, upto, hashed))  # noqa: E731
            flight.snapshot = self._snapshotter.take(
                what, arena, overlap, staged, lambda error: self._copied(flight, writer, seal, error), known
            )
        except BaseException as error:
            self._shared.discard(arena.id)  # it may not have come so far; twice does no harm
            if flight is not None and flight.number in self._flights:
                self._copied(flight, writer, seal, error)
            raise

    def _forget(self, arena: int) -> None:
        self._shared.discard(arena)
        self._link.send(m.Forget(arena))

    def _copied(self, flight: Flight, writer: Writer, seal: m.Seal, error: BaseException | None) -> None:
        flight.copy_end = time.time()
        if error is not None:
            flight.error = error if isinstance(error, Exception) else _interrupted(error)
        with self._changed:  # before the writer hears of it: it may have committed the save when we go on
            flight.copied = True
            self._land(flight)
        if error is None:
            writer.send(seal)
            flight.handle.mark_staged()
        else:
            writer.send(m.Drop(flight.number))

    def _land(self, flight: Flight) -> None:
        """Give the place and the arena back when both sides are done. Called with the lock held."""
        if flight.copied and flight.released and self._flights.pop(flight.number, None) is not None:
            flight.snapshot = None
            self._pool.give_back(flight.arena)
            self._changed.notify_all()

    # Saves of several ranks

    def reserve(self, step: int, attempt: str) -> None:
        """Let ranks write under `attempt`: the writer takes nothing there for a leftover.

        Raises:
            CheckpointError: there is no writer, and none can be started.
        """
        self._link.call(partial(m.Reserve, step=step, attempt=attempt))

    def release(self, step: int, attempt: str) -> None:
        self._link.send(m.Release(step, attempt))

    def look(self, attempt: str, committed: bool) -> None:
        """Something has changed in the storage of what is saved under `attempt`; or it is known to be `committed`."""
        flight = self._flight_of(attempt)
        if flight is not None:
            self._link.send(m.Look(flight.number, committed))

    def abort(self, attempt: str, error: CheckpointError) -> None:
        """Another rank has failed at what is saved under `attempt`: so it fails here, if it is not too late."""
        flight = self._flight_of(attempt)
        if flight is not None:
            with self._changed:
                flight.error = flight.error or error
            self._link.send(m.Drop(flight.number))

    def tell(self, attempt: str) -> None:
        """That the save known by `attempt` has failed is told by now, whether that is known here yet or not."""
        with self._changed:
            for handle in (*self._failed, *(flight.handle for flight in self._flights.values())):
                if handle.attempt == attempt:
                    handle.told = True

    def attempt_of(self, error: BaseException) -> str:
        """Under what the save was known to several ranks that failed with `error`; empty where it was to none."""
        with self._changed:
            return next((handle.attempt for handle in self._failed if handle.error is error), "")

    def _flight_of(self, attempt: str) -> Flight | None:
        with self._changed:
            return next((f for f in self._flights.values() if f.attempt == attempt and not f.released), None)

    # What the writer says

    def _hear(self, reply: OfSave) -> None:
        with self._changed:
            flight = self._flights.get(reply.save)
            if flight is not None and isinstance(reply, m.Progress):
                flight.written = reply.written
                self._changed.notify_all()
        if flight is None or isinstance(reply, m.Progress):
            return
        if isinstance(reply, m.Ready):
            self._on_ready(flight.attempt)
        else:
            self._settle(flight, reply)

    def _settle(self, flight: Flight, reply: m.Committed | m.Failed | m.Dropped) -> None:
        """The writer is done with a save: its outcome is known, and the writer lets go of the arena."""
        handle = flight.handle
        with self._changed:  # whoever sees the outcome finds the place in the queue free
            if flight.released:
                return
            self._known = reply.known if isinstance(reply, m.Committed) else {}
            match reply:
                case m.Committed():
                    writing = (reply.write_begin, reply.write_end, reply.commit_end, reply.size, reply.written)
                    times = Timeline(flight.called, flight.copy_begin, flight.copy_end, *writing)
                    self.mirror.expect(flight.number, handle)
                    handle.finish("committed", timeline=times)
                    self.tally.direct_io = reply.direct
                    self.tally.codec, self.tally.rates = reply.codec, reply.rates
                    self._tell_nonfinite(handle.step, reply.nonfinite)
                case m.Failed():  # of what another rank has failed of, if of that: its end took the files from here
                    handle.finish("failed", flight.error or reply.fault.error())
                case m.Dropped() if flight.error is not None:
                    handle.finish("failed", flight.error)
                case m.Dropped():
                    handle.finish("replaced")
            self.tally.ended(handle)
            if handle.error is not None:
                self._failed.append(handle)
            flight.released = True
            self._land(flight)
            self._changed.notify_all()
        self._on_end(handle)

    def _tell_nonfinite(self, step: int, which: str) -> None:
        """Warn of tensors with NaN or inf; not again of the same ones in the saves that follow."""
        if which and which != self._nonfinite:
            log.warning("step %d is committed and holds NaN or inf: %s", step, which)
        self._nonfinite = which

    def _writer_ended(self, reason: str) -> None:
        with self._changed:
            self._shared.clear()
            self._known = {}
            self.mirror.writer_ended(reason)
            flights = [f for f in self._flights.values() if not f.released]
        for flight in flights:
            message = (
                f"the writer {reason} before step {flight.handle.step} was reported committed. "
                "The next save starts a new writer; steps() tells what there is."
            )
            self._settle(flight, m.Failed(flight.number, m.Fault("StorageError", message, {"retryable": True})))

    def _asked(self, writer: Writer, ask: m.Ask) -> None:
        """The writer wants to know which checkpoints may go: the policy may take its time, on a thread of its own."""
        policy = self.options.keep
        assert policy is not None and not isinstance(policy, Keep)

        def answer() -> None:
            steps = None
            try:
                steps = advise(policy, ask.records)
            except BaseException as error:
                log.error("%s", error)
                with self._changed:
                    self._faults.append(error)
            writer.send(m.Advice(ask.call, steps))

        threading.Thread(target=answer, name="asyncckpt-policy", daemon=True).start()

    @property
    def writer_pid(self) -> int | None:
        writer = self._link.writer
        return None if writer is None else writer.pid

    def trust(self, step: int) -> None:
        """Tell the writer that all bytes of `step` have just been verified."""
        self._link.send(m.Trust(step))

    def delete(self, step: int) -> None:
        self._link.call(partial(m.Delete, step=step))

    def rewind(self, step: int) -> None:
        self._link.call(partial(m.RewindTo, step=step))

    def noted(self) -> None:
        """Tell the writer that notes of committed steps have changed."""
        self._link.send(m.Noted())

    # Waiting

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While inside, the writer works at normal priority."""
        self._waits(+1)
        try:
            yield
        finally:
            self._waits(-1)

    def _waits(self, change: int) -> None:
        with self._changed:
            before, self._waiters = self._waiters > 0, self._waiters + change
            now = self._waiters > 0
            if now != before:
                self._link.hurry(now)

    def hurry(self) -> None:
        """From now on, the writer works at normal priority, whether somebody waits or not."""
        self._waits(+1)

    def join_copies(self) -> None:
        """Return when no copy under way can be reached by a change any more."""
        with self._changed:
            snapshots = [f.snapshot for f in self._flights.values() if f.snapshot is not None]
        for snapshot in snapshots:
            snapshot.fence()

    def drain(self, timeout: float | None, update: Callable[[], None] = lambda: None) -> bool:
        """Wait until nothing is in flight; False after `timeout` seconds. `update` is called meanwhile."""
        deadline = None if timeout is None else time.monotonic() + timeout
        patience = Patience("saves to be committed", self.options.root)
        with self.waiting(), self._changed:
            while self._flights:
                left = 0.25 if deadline is None else min(0.25, deadline - time.monotonic())
                if left <= 0:
                    return False
                patience.wait(self._changed, left)
                update()
        return True

    def progress(self) -> tuple[int, int]:
        """Bytes written, and bytes in all, of the saves in flight."""
        with self._changed:
            flights = list(self._flights.values())
        return sum(f.written for f in flights), sum(f.size for f in flights)

    @property
    def in_flight(self) -> list[SaveHandle]:
        with self._changed:
            return [f.handle for f in self._flights.values()]

    @property
    def arena_bytes(self) -> int:
        return self._pool.total

    @property
    def untouched(self) -> bool:
        """Whether no arena was ever taken."""
        return self._pool.total == 0

    def reserve_arenas(self, size: int) -> None:
        """Take what arenas of `size` bytes there may be and are not, and touch their pages in the background."""
        leased: list[Arena] = []
        with self._changed:
            try:
                for _ in range(self._max_in_flight - self._pool.leased):
                    arena = self._pool.lease(size, leased)
                    if arena is None:
                        break
                    leased.append(arena)
            except CheckpointError:
                if not leased:
                    raise  # else a second arena does not fit: the queue will wait for the first
            finally:
                self._pool.take_back(leased)
        for arena in leased:
            self._snapshotter.pool.submit(arena.reserve)

    # Failures

    def failures(self, *, take: bool) -> list[BaseException]:
        """Background failures that the caller was not told of yet, oldest first.

        With `take` they count as told from now on. A handle's `result` tells, too.
        """
        with self._changed:
            failed = [handle.error for handle in self._failed if not handle.told and handle.error is not None]
            failed += self._faults
            if take:
                self._failed.clear()
                self._faults.clear()
        return failed

    def close(self) -> None:
        """End the writer. What is in flight it finishes; wait for that with `drain` first."""
        self._link.close()
        with self._changed:
            self._pool.close()


def _interrupted(error: BaseException) -> CheckpointError:
    failure = CheckpointError(f"the copy of the snapshot was interrupted by {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure
