"""How long steps take, with and without a save in flight: what a save costs the training.

The one place where costs are measured; the choice of `overlap="auto"` and the cadence `Auto` both follow it.
"""

from __future__ import annotations

import statistics
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from torch.optim import Optimizer

from asyncckpt.policy.cadence import Measured
from asyncckpt.policy.overlap import OverlapTrial

_QUIET = 32
"""Steps with nothing in flight that are remembered."""
_SHORTER = 0.85
"""No save makes steps shorter: where those in flight take less than this share of what is usual, that is over."""
_LOOK = 16
"""Steps after which what is usual is reckoned anew."""
_RECENT = 5
"""Saves that the reported costs are the mean of: what all of them cost is to be bounded. None counts for more than its
flight."""
_PAUSE = 10.0
"""A step of this many usual ones, an evaluation in between, say, is not what is usual, and no cost of a save."""


@dataclass
class _Window:
    """A save being measured: from the step boundary before its `save` to the first one after its end."""

    overlapped: bool
    begun: float
    steps: list[float] = field(default_factory=list)
    """What its steps took, without what they waited for the save."""
    waited: float = 0.0
    flight: float | None = None
    """Seconds from `save` until it was committed; None before that."""


class StepMeter:
    """Hears of every step, and of every save's begin, return and end.

    Steps are heard of by `maybe_save`, or, where that is not called, by the first optimizer. `fenced` gives the
    seconds that steps have waited for copies so far. `learned` is called when one more save has been measured.
    """

    def __init__(
        self,
        trial: OverlapTrial | None,
        fenced: Callable[[], float] = lambda: 0.0,
        learned: Callable[[Measured], None] = lambda measured: None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.trial = trial
        self._fenced, self._learned, self._now = fenced, learned, now
        self._told_of_steps = False
        self._clock: weakref.ref[Optimizer] | None = None
        self._last: float | None = None
        self._blocked = 0.0
        self._fenced_before = fenced()
        self._busy = False
        self._quiet: deque[float] = deque(maxlen=_QUIET)
        self._quiet_steps = 0
        self._usual: float | None = None
        """The mean of a step with nothing in flight."""
        self._longest = float("inf")
        """The length of a pause."""
        self._window: _Window | None = None
        self._per_step: bool | None = None
        self._saves = 0
        self._newest_blocked: float | None = None
        self._first: tuple[float, float] | None = None
        self._costs: deque[tuple[float, float]] = deque(maxlen=_RECENT)

    @property
    def measured(self) -> Measured:
        costs = list(self._costs) or ([self._first] if self._first is not None else [])
        return Measured(
            step=self._usual,
            tax=statistics.fmean(tax for tax, _ in costs) if costs else self._newest_blocked,
            to_committed=statistics.median(flight for _, flight in costs) if costs else None,
            saves=self._saves,
            in_flight=self._window is not None and self._window.flight is None,
            quiet_steps=None if self._last is None else self._quiet_steps,
        )

    # Steps

    def tick(self, optimizer: Optimizer) -> None:
        """An optimizer's step begins."""
        if self._told_of_steps:
            return
        if self._clock is None or self._clock() is None:
            self._clock = weakref.ref(optimizer)
        if self._clock() is optimizer:
            self._boundary()

    def step_ends(self) -> None:
        """`maybe_save` is called: from now on, this is what tells steps apart."""
        if not self._told_of_steps:
            self._told_of_steps = True
            self._last, self._window = None, None
            self._quiet_steps = 0
            self._forget_steps()
        self._boundary()

    def _boundary(self) -> None:
        now, fenced = self._now(), self._fenced()
        window = self._window
        if self._last is not None:
            waited = self._blocked + fenced - self._fenced_before
            own = max(0.0, now - self._last - waited)
            if window is not None:
                window.steps.append(own)
                window.waited += waited
            elif not self._busy:
                self._quiet.append(own)
                self._quiet_steps += 1
                if self._quiet_steps % _LOOK == 0 or len(self._quiet) < _LOOK:
                    self._look()
        self._last, self._blocked, self._fenced_before = now, 0.0, fenced
        self._busy = window is not None
        if window is not None and window.flight is not None:
            self._busy = False
            self._close()

    # Saves

    def save_begins(self, overlapped: bool) -> None:
        if self._window is not None:
            self._close()
        self._saves += 1
        self._busy = True
        self._quiet_steps = 0
        self._window = _Window(overlapped, self._now())

    def save_returns(self, blocked: float) -> None:
        """`save` has taken `blocked` seconds of the step that is under way."""
        self._blocked += blocked
        self._newest_blocked = blocked

    def save_ends(self, *, committed: bool) -> None:
        """Called from another thread when the newest save ended; one that failed says nothing of costs."""
        window = self._window
        if window is not None:
            if committed:
                window.flight = self._now() - window.begun
            else:
                self._window = None

    def _close(self) -> None:
        """Reckon what the save in the window has cost, but for one during which no step ended."""
        window, self._window = self._window, None
        if window is None or not window.steps:
            return
        if self._quiet:
            self._look()
        if self._per_step is None:
            self._per_step = not self._quiet
        steps = [min(step, self._longest) for step in window.steps]
        if self._usual is not None and statistics.fmean(steps) < _SHORTER * self._usual:
            self._forget_steps()  # a warm-up is over, say: beside its steps each save would look free
            return
        wall = window.waited + sum(steps)
        excess = wall - len(steps) * (self._usual or 0.0)
        if self.trial is not None:
            self.trial.record(window.overlapped, wall / len(steps) if self._per_step else excess)
        if window.flight is not None and self._quiet:  # nothing is slower for a save than its flight is long
            self._count(max(window.waited, min(excess, window.flight)), window.flight)

    def _forget_steps(self) -> None:
        self._quiet.clear()
        self._usual, self._longest = None, float("inf")

    def _look(self) -> None:
        """Reckon what is usual."""
        self._longest = _PAUSE * statistics.median(self._quiet)
        self._usual = statistics.fmean(step for step in self._quiet if step <= self._longest)

    def _count(self, tax: float, flight: float) -> None:
        """One more save is measured. The first takes fresh memory: it counts only until there is another."""
        if self._first is None:
            self._first = (tax, flight)
        else:
            self._costs.append((tax, flight))
        self._learned(self.measured)
