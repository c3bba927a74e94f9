"""How long steps take, with and without a save in flight; feeds the choice behind `overlap="auto"`."""

from __future__ import annotations

import statistics
import time
import weakref
from collections import deque
from dataclasses import dataclass

from torch.optim import Optimizer

from asyncckpt.policy.overlap import OverlapTrial


@dataclass
class _Window:
    """A save being measured: from its `save` until the first step after its commit."""

    overlapped: bool
    begun: float
    steps: int = 0
    committed: bool = False


class StepMeter:
    """Hears of every optimizer step (of the first optimizer it hears of) and of every save's begin and end."""

    def __init__(self, trial: OverlapTrial | None) -> None:
        self.trial = trial
        self._clock: weakref.ref[Optimizer] | None = None
        self._last: float | None = None
        self._busy = False
        self._idle: deque[float] = deque(maxlen=32)
        self._window: _Window | None = None
        self._per_step: bool | None = None

    def tick(self, optimizer: Optimizer) -> None:
        if self._clock is None or self._clock() is None:
            self._clock = weakref.ref(optimizer)
        if self._clock() is not optimizer:
            return
        now = time.perf_counter()
        if self._last is not None and not self._busy and self._window is None:
            self._idle.append(now - self._last)
        self._last, self._busy = now, self._window is not None
        if self._window is not None:
            self._window.steps += 1
            if self._window.committed:
                self._close(now)

    def save_begins(self, overlapped: bool) -> None:
        now = time.perf_counter()
        if self._window is not None:
            self._close(now)
        self._busy = True
        self._window = _Window(overlapped, now)

    def save_ends(self, *, committed: bool) -> None:
        """Called from another thread when the newest save ended; one that failed says nothing of costs."""
        window = self._window
        if window is not None:
            if committed:
                window.committed = True
            else:
                self._window = None

    def _close(self, now: float) -> None:
        window, self._window = self._window, None
        if window is None or self.trial is None or window.steps == 0:
            return
        if self._per_step is None:
            self._per_step = not self._idle
        wall = now - window.begun
        if self._per_step:
            cost = wall / window.steps
        else:
            cost = wall - window.steps * statistics.median(self._idle) if self._idle else wall
        self.trial.record(window.overlapped, cost)
