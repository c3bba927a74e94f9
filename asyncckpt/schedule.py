"""When a run is saved, and which parts: cadence and clocks, the costs that they see, notices of a preemption."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from asyncckpt.policy.auto import Auto, Interval, Pacer
from asyncckpt.policy.cadence import Cadence, Measured, Moment
from asyncckpt.policy.clocks import Clocks
from asyncckpt.policy.overlap import OverlapTrial
from asyncckpt.preemption import Notice
from asyncckpt.snapshot.meter import StepMeter

Reason = Literal["cadence", "notice"]


@dataclass(frozen=True)
class Due:
    """Why a step is to be saved; and, for a cadence, which `parts` have clocks that say so, and whether `others` go."""

    reason: Reason
    parts: frozenset[str] = frozenset()
    others: bool = True


class Schedule:
    """Decides for one Checkpointer.

    `notice` gives the first notice to leave, if one has come, where any is listened for; `fenced` the seconds that
    steps have waited for copies so far.
    """

    def __init__(
        self,
        cadence: Cadence | Auto | None,
        notice: Callable[[], Notice | None] | None = None,
        trial: OverlapTrial | None = None,
        fenced: Callable[[], float] = lambda: 0.0,
        now: Callable[[], float] = time.monotonic,
        clocks: Mapping[str, Cadence] | None = None,
    ) -> None:
        self._cadence = Pacer(cadence) if isinstance(cadence, Auto) else cadence
        self.meter = StepMeter(trial, fenced, self._learn, now)
        self._notice = notice
        self.answered = False
        self._now = now
        self._last_save = now()
        self.clocks = Clocks(clocks or {}, now())

    @property
    def notice(self) -> Notice | None:
        """The first notice to leave, if one has come."""
        return self._notice() if self._notice is not None else None

    @property
    def interval(self) -> Interval | None:
        """What `Auto` has chosen; None while it measures, and with any other cadence."""
        return self._cadence.interval if isinstance(self._cadence, Pacer) else None

    def decide(self, step: int) -> Due | None:
        """Why `step` is to be saved, and what of it, if it is. Asking changes nothing.

        Several ranks may come to different answers: rank 0's counts.

        Raises:
            ValueError: there is nothing to decide by.
        """
        if self.notice is not None and not self.answered:
            return Due("notice")
        now, measured = self._now(), self.meter.measured
        parts = self.clocks.due(step, now, measured)
        if self._cadence is not None:
            others = self._cadence.due(Moment(step, now - self._last_save, measured))
        elif self._notice is not None or self.clocks.named:
            others = bool(parts)
        else:
            raise ValueError("maybe_save needs a cadence: Checkpointer(..., cadence=asyncckpt.Every(steps=100))")
        return Due("cadence", parts, others) if parts or others else None

    def answer(self, notice: Notice | None) -> None:
        """What a notice (if there was one) asked for is being saved; from now on the cadence decides again."""
        self.answered = self.answered or notice is not None

    def give_up(self) -> None:
        """A notice has come, and can't be answered by a save: it is time to leave all the same."""
        self.answered = True

    def save_begins(self, parts: Iterable[str] = ()) -> int:
        """A save of these parts is made, or skipped. Returns its number: see `Clocks.came_to_nothing`."""
        parts, now = list(parts), self._now()
        if not self.clocks.named or not self.clocks.named.keys() >= set(parts):
            self._last_save = now
        return self.clocks.saved(parts, now)

    def restored(self, parts: Iterable[str], stale: Iterable[str]) -> None:
        """These parts are what they were at a save, and the `stale` ones what they were at an earlier one."""
        self.clocks.saved(stale, self._now())
        self.clocks.saved(parts, self._now())

    def _learn(self, measured: Measured) -> None:
        if isinstance(self._cadence, Pacer):
            self._cadence.learn(measured)
