"""When a run is saved: its cadence, the measured costs that it sees, and notices of a preemption."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

from asyncckpt.policy.auto import Auto, Interval, Pacer
from asyncckpt.policy.cadence import Cadence, Measured, Moment
from asyncckpt.policy.overlap import OverlapTrial
from asyncckpt.preemption import Notice, Watch
from asyncckpt.snapshot.meter import StepMeter

Reason = Literal["cadence", "notice"]


class Schedule:
    """Decides for one Checkpointer. `fenced` gives the seconds that steps have waited for copies so far."""

    def __init__(
        self,
        cadence: Cadence | Auto | None,
        watch: Watch | None = None,
        trial: OverlapTrial | None = None,
        fenced: Callable[[], float] = lambda: 0.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cadence = Pacer(cadence) if isinstance(cadence, Auto) else cadence
        self.meter = StepMeter(trial, fenced, self._learn, now)
        self._watch = watch
        self.answered = False
        self._now = now
        self._last_save = now()

    @property
    def notice(self) -> Notice | None:
        """The first notice to leave, if one has come."""
        return self._watch.notice if self._watch is not None else None

    @property
    def interval(self) -> Interval | None:
        """What `Auto` has chosen; None while it measures, and with any other cadence."""
        return self._cadence.interval if isinstance(self._cadence, Pacer) else None

    def decide(self, step: int) -> Reason | None:
        """Why `step` is to be saved, if it is. Asking changes nothing.

        All that decides this comes together here: one rank that asks could publish the answer to the others.

        Raises:
            ValueError: there is nothing to decide by.
        """
        if self.notice is not None and not self.answered:
            return "notice"
        if self._cadence is None:
            if self._watch is not None:
                return None
            raise ValueError("maybe_save needs a cadence: Checkpointer(..., cadence=asyncckpt.Every(steps=100))")
        moment = Moment(step, self._now() - self._last_save, self.meter.measured)
        return "cadence" if self._cadence.due(moment) else None

    def answer(self, notice: Notice | None) -> None:
        """What a notice (if there was one) asked for is being saved; from now on the cadence decides again."""
        self.answered = self.answered or notice is not None

    def save_begins(self) -> None:
        """A save is made, or skipped."""
        self._last_save = self._now()

    def _learn(self, measured: Measured) -> None:
        if isinstance(self._cadence, Pacer):
            self._cadence.learn(measured)
