"""When a run is saved: its cadence, and the measured costs that cadence sees."""

from __future__ import annotations

import time
from collections.abc import Callable

from asyncckpt.policy.auto import Auto, Interval, Pacer
from asyncckpt.policy.cadence import Cadence, Measured, Moment
from asyncckpt.policy.overlap import OverlapTrial
from asyncckpt.snapshot.meter import StepMeter


class Schedule:
    """Decides for one Checkpointer. `fenced` gives the seconds that steps have waited for copies so far."""

    def __init__(
        self,
        cadence: Cadence | Auto | None,
        trial: OverlapTrial | None = None,
        fenced: Callable[[], float] = lambda: 0.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cadence = Pacer(cadence) if isinstance(cadence, Auto) else cadence
        self.meter = StepMeter(trial, fenced, self._learn, now)
        self._now = now
        self._last_save = now()

    @property
    def interval(self) -> Interval | None:
        """What `Auto` has chosen; None while it measures, and with any other cadence."""
        return self._cadence.interval if isinstance(self._cadence, Pacer) else None

    def due(self, step: int) -> bool:
        """Whether `step` is to be saved. Everything that decides this does it here, and asking changes nothing.

        Raises:
            ValueError: there is no cadence.
        """
        if self._cadence is None:
            raise ValueError("maybe_save needs a cadence: Checkpointer(..., cadence=asyncckpt.Every(steps=100))")
        return self._cadence.due(Moment(step, self._now() - self._last_save, self.meter.measured))

    def save_begins(self) -> None:
        """A save is made, or skipped."""
        self._last_save = self._now()

    def _learn(self, measured: Measured) -> None:
        if isinstance(self._cadence, Pacer):
            self._cadence.learn(measured)
