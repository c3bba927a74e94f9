"""How a mirror stands: what it has taken, and what it fails of; for the trainer, which is told, and who waits."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from msgspec import structs

from asyncckpt.errors import ConflictError, StorageError
from asyncckpt.write import messages as m
from asyncckpt.write.workers import Workers

log = logging.getLogger("asyncckpt")
_PROGRESS_STEP = 64 << 20


class Standing:
    """Of one mirror, to which `workers` copy. `backlog` tells how many steps wait. Used on the event loop only."""

    def __init__(
        self, to: m.MirrorTo, workers: Workers, reply: Callable[[m.Reply], None], backlog: Callable[[], int]
    ) -> None:
        self._to, self._workers, self._reply, self._backlog = to, workers, reply, backlog
        self._counts = self._told = m.MirrorState()
        self._changed, self._nudge = asyncio.Event(), asyncio.Event()
        self._moved = time.monotonic()
        self._failing_since, self._failures = 0.0, 0
        self._waiting = 0
        self.error: Exception | None = None
        """What it fails of."""

    # What happens

    def moves(self, delay: float = 0.0) -> None:
        """It takes something now, or will after `delay` seconds: until then it is not hung."""
        self._moved = time.monotonic() + delay

    def took(self, size: int) -> None:
        """So many bytes more."""
        self._counts = structs.replace(self._counts, bytes=self._counts.bytes + size)
        if self._counts.bytes - self._told.bytes >= _PROGRESS_STEP:
            self.tell()

    def has(self, step: int) -> None:
        """It has `step` now."""
        self._counts = structs.replace(self._counts, step=step, steps=self._counts.steps + 1)

    def passes_over(self) -> None:
        """One step will not be copied."""
        self._counts = structs.replace(self._counts, passed_over=self._counts.passed_over + 1)

    def fails(self, error: Exception) -> None:
        if self.error is None:
            self._failing_since = time.monotonic()
            level = logging.INFO if isinstance(error, ConflictError) else logging.WARNING
            log.log(level, "mirroring to %s fails, and is tried again: %s", self._to.url, error)
        self.error = error
        self._failures += 1
        self.tell()

    def recovers(self) -> None:
        if self.error is not None:
            log.info("mirroring to %s goes on", self._to.url)
        self.error = None

    def tell(self) -> None:
        """Say how things stand, where that has changed, and wake those who wait."""
        state = structs.replace(self._counts, backlog=self._backlog(), error=str(self.error or ""))
        if state != self._told:
            self._told = state
            self._reply(state)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    # Who waits

    async def rest(self, seconds: float) -> None:
        """Stand back for so long, or until somebody comes to wait for the mirror."""
        self._nudge.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._nudge.wait(), seconds)

    async def until(self, done: Callable[[], bool]) -> None:
        """Return when that is so; the mirror works at normal priority meanwhile.

        Raises:
            Exception: what the mirror fails of, for good or for `timeout` seconds; or it hangs.
        """
        self._waiting += 1
        self._workers.hurry = True
        self._nudge.set()
        since = time.monotonic(), self._failures
        try:
            while not done():
                error, left = self._patience(*since)
                if left <= 0:
                    raise error
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), left)
        finally:
            self._waiting -= 1
            self._workers.hurry = self._waiting > 0

    def _patience(self, asked: float, failures: int) -> tuple[Exception, float]:
        """What whoever waits is to be told, and in how many seconds. It was `asked` after so many `failures`: the
        mirror is tried once more at least."""
        now = time.monotonic()
        if self.error is None:
            silent = f"{self._to.url} has taken nothing for {self._to.timeout:g} s: is it slow or hung?"
            return StorageError(silent, retryable=True), self._moved + self._to.timeout - now
        if self._failures == failures:
            return self.error, asked + self._to.timeout - now
        passing = isinstance(self.error, ConflictError) or getattr(self.error, "retryable", False)
        return self.error, self._failing_since + self._to.timeout - now if passing else 0.0
