"""The trainer's link to its writer: starts one where none runs, asks it, hears its replies and notices its death."""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from asyncckpt.errors import StorageError
from asyncckpt.policy.codec import Codec
from asyncckpt.policy.keep import Keep, Policy
from asyncckpt.storage.posix import Posix
from asyncckpt.storage.urls import StorageOptions
from asyncckpt.write import messages as m
from asyncckpt.write.client import ProcessWriter, ThreadWriter, Writer

log = logging.getLogger("asyncckpt")
SLOW = 30.0
"""Seconds after which somebody who waits for the storage says so."""
_GOODBYE = 60.0
"""Seconds that `close` waits for the end of a writer that has nothing left to do."""

OfSave = m.Progress | m.Ready | m.Committed | m.Failed | m.Dropped
OfMirror = m.Mirrored | m.MirrorState


class Patience:
    """Somebody waits, for `what`, on the storage at `root`: after `SLOW` seconds the log says so, once."""

    def __init__(self, what: str, root: str) -> None:
        self._what, self._root = what, root
        self._begun = time.monotonic()
        self._told = False

    def wait(self, changed: threading.Condition, seconds: float = math.inf) -> None:
        """Wait for a change, for so many seconds at most. Called with the lock held."""
        left = math.inf if self._told else max(0.0, self._begun + SLOW - time.monotonic())
        changed.wait(None if left == seconds == math.inf else min(left, seconds))
        if not self._told and time.monotonic() - self._begun >= SLOW:
            self._told = True
            log.warning("%g s of waiting for %s: is %s slow or hung?", SLOW, self._what, self._root)


@dataclass(frozen=True)
class Options:
    """What a writer is told once."""

    root: str
    keep: Keep | Policy | None
    lock_timeout: float
    process: bool
    check_finite: bool = False
    codec: Codec = field(default_factory=Codec)
    direct: bool = True
    rank: int = 0
    mirror: m.MirrorTo | None = None
    posix: Posix | None = None
    storage: StorageOptions = field(default_factory=StorageOptions)


class Link:
    """At most one writer at a time. `changed` guards the tables and is notified of what happens.

    `on_reply` gets what a writer says of saves, `on_mirror` what of the mirror, `on_ask` the writer and what it asks of
    the policy, `on_death` the reason when one that had been opened has ended; they are called from a thread of the
    writer's.
    """

    def __init__(
        self,
        options: Options,
        changed: threading.Condition,
        on_reply: Callable[[OfSave], None],
        on_ask: Callable[[Writer, m.Ask], None],
        on_death: Callable[[str], None],
        on_mirror: Callable[[OfMirror], None],
    ) -> None:
        self._options, self._changed = options, changed
        self._on_reply, self._on_ask, self._on_death, self._on_mirror = on_reply, on_ask, on_death, on_mirror
        self._writer: Writer | None = None
        self._hurry = False
        self._calls = itertools.count(1)
        self._answers: dict[int, m.Done | None] = {}

    @property
    def writer(self) -> Writer | None:
        """The writer that runs, if one does."""
        return self._writer

    def ensure(self) -> Writer:
        """The writer that runs, or a new one that has come to own the run.

        Raises:
            ConflictError: another writer owns the run, still after `lock_timeout` seconds.
            StorageError: the directory can't be used, or the writer can't be started.
        """
        with self._changed:
            if self._writer is not None:
                return self._writer
        start = _Start(self._changed)
        kind = ProcessWriter if self._options.process else partial(ThreadWriter, posix=self._options.posix)
        writer = kind(partial(self._hear, start), partial(self._end, start))
        options = self._options
        keep = options.keep if isinstance(options.keep, Keep) else None
        asks = options.keep is not None and keep is None
        told = options.direct, asks, options.check_finite, options.codec, options.rank, options.storage, options.mirror
        writer.send(m.Open(options.root, options.lock_timeout, keep, *told))
        start.wait(Patience("the writer to own the run, if no other does", options.root))
        with self._changed:
            if start.ended is not None:
                raise StorageError(f"the writer {start.ended} as soon as it owned the run", retryable=True)
            self._writer = start.writer = writer
            if self._hurry:
                writer.send(m.Hurry(True))
        return writer

    def send(self, message: m.Request) -> None:
        """Tell the writer that runs; where none does there is nobody to tell."""
        writer = self._writer
        if writer is not None:
            writer.send(message)

    def hurry(self, on: bool) -> None:
        """Somebody waits, or nobody does any more; also told to writers that start meanwhile."""
        with self._changed:
            self._hurry = on
            self.send(m.Hurry(on))

    def call(
        self, make: Callable[[int], m.OfRun], patience: Patience | None = None, timeout: float | None = None
    ) -> None:
        """Send `make(number)` and wait for the answer.

        Raises:
            CheckpointError: what the writer answered.
            TimeoutError: it has not, after `timeout` seconds.
        """
        writer, call = self.ensure(), next(self._calls)
        patience = patience or Patience("the writer to delete or rewind", self._options.root)
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        with self._changed:
            self._answers[call] = None
            writer.send(make(call))
            while (answer := self._answers[call]) is None:
                if writer is not self._writer:
                    answer = m.Done(call, m.Fault("StorageError", "the writer ended before it answered"))
                    break
                left = deadline - time.monotonic()
                if left <= 0:
                    del self._answers[call]
                    raise TimeoutError(f"the writer has not answered after {timeout:g} s")
                patience.wait(self._changed, left)
            del self._answers[call]
        if answer.fault is not None:
            raise answer.fault.error()

    def close(self) -> None:
        """End the writer, which finishes what it has begun."""
        writer = self._writer
        if writer is not None:
            writer.send(m.Close())
            writer.join(_GOODBYE)

    def _hear(self, start: _Start, reply: m.Reply) -> None:
        match reply:
            case m.Opened() | m.Refused():
                start.answer(reply)
            case m.Done():
                with self._changed:
                    if reply.call in self._answers:
                        self._answers[reply.call] = reply
                        self._changed.notify_all()
            case m.Ask() if start.writer is not None:
                self._on_ask(start.writer, reply)
            case m.Mirrored() | m.MirrorState():
                self._on_mirror(reply)
            case m.Progress() | m.Ready() | m.Committed() | m.Failed() | m.Dropped():
                self._on_reply(reply)

    def _end(self, start: _Start, reason: str) -> None:
        with self._changed:  # throughout: no save may be given to the next writer before those of this one have failed
            start.ended = reason
            if start.writer is not None and start.writer is self._writer:
                self._writer = None
                self._on_death(reason)
            self._changed.notify_all()


class _Start:
    """A writer on its way to owning the run."""

    def __init__(self, changed: threading.Condition) -> None:
        self._changed = changed
        self._answer: m.Opened | m.Refused | None = None
        self.ended: str | None = None
        self.writer: Writer | None = None
        """Set when it has become the writer of the link."""

    def answer(self, reply: m.Opened | m.Refused) -> None:
        with self._changed:
            self._answer = reply
            self._changed.notify_all()

    def wait(self, patience: Patience) -> None:
        """Return when the writer owns the run."""
        with self._changed:
            while self._answer is None and self.ended is None:
                patience.wait(self._changed)
            answer = self._answer
        if answer is None:
            raise StorageError(f"the writer {self.ended} before it owned the run; its stderr says why")
        if isinstance(answer, m.Refused):
            raise answer.fault.error()
