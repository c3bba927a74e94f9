"""One save, as its caller sees it."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

from asyncckpt.errors import CheckpointError, NotSupportedError

Outcome = Literal["pending", "committed", "skipped", "replaced", "failed"]
MirrorOutcome = Literal["none", "pending", "mirrored", "passed over", "failed"]
Waiting = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class Timeline:
    """When the phases of a committed save began and ended, in seconds of `time.time()`."""

    saved: float
    """`save` was called."""
    copy_begin: float
    copy_end: float
    """The snapshot was whole: what happens to the live tensors later can't reach it."""
    write_begin: float
    write_end: float
    """All files were durable."""
    commit_end: float
    """The manifest was durable too: this is when the save became *committed*."""
    size: int
    """Bytes of all files."""
    written: int
    """Of these, bytes of files that are new: others are shared with earlier checkpoints."""


class SaveHandle:
    """One save. Awaitable; safe to use from any thread.

    `outcome` is "pending", then for ever one of

        committed  durable and visible
        skipped    not taken: the queue was full (`when_full="skip"`)
        replaced   taken, and given up for a newer one (`when_full="replace"`)
        failed     not committed; `result` raises why
    """

    def __init__(self, step: int, waiting: Waiting = nullcontext, omitted: tuple[str, ...] = ()) -> None:
        self.step = step
        self.omitted = omitted
        """The parts of the state that are left out of it; none, and it is complete."""
        self.outcome: Outcome = "pending"
        self.blocked = 0.0
        """Seconds that `save` took."""
        self.timeline: Timeline | None = None
        """Known once committed."""
        self.error: BaseException | None = None
        """Why it failed."""
        self.told = False
        """Whether `result` has raised the error: then nothing else raises it again."""
        self.attempt = ""
        """What the save is known by among several ranks."""
        self.mirror: MirrorOutcome = "none"
        """What became of it on the mirror, once committed: see `wait_mirrored`."""
        self.mirror_error: BaseException | None = None
        """Why it can't be mirrored."""
        self.mirror_told = False
        """Whether `wait_mirrored` has raised that."""
        self.wait_for_mirror: Callable[[float | None], None] | None = None
        """Return when `mirror` is not pending any more; raises where that is not to be expected."""
        self._waiting = waiting
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._staged = threading.Event()
        self._done = threading.Event()
        self._callbacks: list[Callable[[SaveHandle], None]] = []

    def __repr__(self) -> str:
        return f"<SaveHandle step {self.step}: {self.outcome}>"

    def done(self) -> bool:
        return self._done.is_set()

    def wait_staged(self, timeout: float | None = None) -> bool:
        """Wait until the snapshot is whole and in the hands of the writer; False after `timeout` seconds.

        With `writer="process"` the save will then be committed even if this process is killed. Also True where
        the save has ended without: `outcome` tells.
        """
        self._check_process()
        return self._staged.wait(timeout)

    def result(self, timeout: float | None = None) -> Outcome:
        """Wait for the end, and return the outcome.

        Raises:
            CheckpointError: the save failed; the very error.
            TimeoutError: it is still pending after `timeout` seconds.
        """
        self._check_process()
        if not self._done.is_set():
            with self._waiting():
                self._done.wait(timeout)
        if not self._done.is_set():
            raise TimeoutError(f"the save of step {self.step} is still pending after {timeout:g} s")
        if self.error is not None:
            self.told = True
            raise self.error
        return self.outcome

    def wait_mirrored(self, timeout: float | None = None) -> MirrorOutcome:
        """Wait until the save is committed on the mirror, too, and return what became of it there:

            mirrored     committed there
            passed over  not copied: the mirror's retention would not keep it, or it was saved again or is gone
            none         it was not committed here: `outcome` tells

        Raises:
            CheckpointError: the save failed, the very error; or its bytes were damaged before their turn came; or the
                mirror fails for good, or for `mirror_timeout` seconds. (It is tried further, and a later call may find
                it mirrored.)
            NotSupportedError: there is no mirror, or it is that of rank 0.
            TimeoutError: it is still pending after `timeout` seconds.
        """
        begun = time.monotonic()
        if self.result(timeout) != "committed":
            return "none"
        if self.wait_for_mirror is None:
            raise NotSupportedError(
                "this save has no mirror: give the Checkpointer mirror=; of several ranks ask rank 0"
            )
        if self.mirror == "pending":
            try:
                self.wait_for_mirror(None if timeout is None else max(0.0, begun + timeout - time.monotonic()))
            except CheckpointError:
                if self.mirror == "pending":
                    raise
        if self.mirror_error is not None:
            self.mirror_told = True
            raise self.mirror_error
        return self.mirror

    def add_done_callback(self, callback: Callable[[SaveHandle], None]) -> None:
        """Call `callback(handle)` at the end, on a thread of the library: it must be quick. At once if it has ended."""
        with self._lock:
            if not self._done.is_set():
                self._callbacks.append(callback)
                return
        callback(self)

    def __await__(self) -> Generator[None, None, Outcome]:
        return self._wait().__await__()

    async def _wait(self) -> Outcome:
        self._check_process()
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()

        def wake(_: SaveHandle) -> None:
            try:
                loop.call_soon_threadsafe(ended.set)
            except RuntimeError:
                pass  # the loop was closed meanwhile: nobody waits any more

        self.add_done_callback(wake)
        with self._waiting():
            await ended.wait()
        return self.result(0)

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise CheckpointError("this save belongs to the process that forked; it can't be waited for in the child")

    # For the session

    def mark_staged(self) -> None:
        self._staged.set()

    def finish(self, outcome: Outcome, error: BaseException | None = None, timeline: Timeline | None = None) -> None:
        """Settle the outcome, once; a second call changes nothing."""
        with self._lock:
            if self._done.is_set():
                return
            self.error, self.timeline, self.outcome = error, timeline, outcome
            self._staged.set()
            self._done.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback(self)
