"""How often to save, from what steps and saves were measured to cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from asyncckpt.policy.cadence import Measured, Moment
from asyncckpt.policy.plan import daly

Limit = Literal["overhead", "drain", "failures", "step"]
_LEARNING = 2
"""Saves made early, to be measured. The first takes fresh memory and says little: the second is the one that counts."""
_QUIET_STEPS = 3
"""Steps with nothing in flight before each of them."""
_UNHEARD = 60.0
"""Seconds before each of them where no step was heard of."""
_LEEWAY = 0.05
"""The interval in use stays while the best one is no further off than this share of it."""


@dataclass(frozen=True, slots=True)
class Auto:
    """As often as costs allow, which are measured as the training goes.

    The first two saves come early, a few steps apart, to be measured. From then on the time from one save to the next
    is the longest of

    - the tax of a save over `max_overhead`,
    - the time until a save is committed, so that no two are in flight,
    - with `mtbf`, Daly's optimum with the tax as the cost of a save.

    `Checkpointer.stats().interval` says which it is. One that is in use is kept until the best is over 5 % away.

    Args:
        max_overhead: the share of the training that saves may take, between 0 and 1.
        mtbf: mean seconds between failures of the whole job, if they are to be weighed: saving more often than pays
            is then avoided. `max_overhead` still bounds the cost.

    Raises:
        ValueError: one of them is out of range.
    """

    max_overhead: float = 0.01
    mtbf: float | None = None

    def __post_init__(self) -> None:
        if not _is_number(self.max_overhead) or not 0 < self.max_overhead < 1:
            raise ValueError(f"Auto(max_overhead={self.max_overhead!r}): give a share between 0 and 1, such as 0.01")
        if self.mtbf is not None and not (_is_number(self.mtbf) and 0 < self.mtbf < math.inf):
            raise ValueError(f"Auto(mtbf={self.mtbf!r}): give seconds, more than 0, or None")

    def interval(self, measured: Measured) -> Interval | None:
        """The best interval for these costs; None while they are not known."""
        tax, step = measured.tax, measured.step
        if tax is None:
            return None
        text = f"a save costs the training {tax:.3g} s, and all of them may take {100 * self.max_overhead:g} % of it"
        wanted: list[tuple[float, Limit, str]] = [(tax / self.max_overhead, "overhead", text)]
        if step is not None:
            wanted.append((step, "step", f"a step takes {step:.3g} s, and costs allow a save after each"))
        if measured.to_committed is not None:
            text = f"a save is committed after {measured.to_committed:.3g} s, and no two are to be in flight"
            wanted.append((measured.to_committed, "drain", text))
        if self.mtbf is not None:
            text = f"with a failure every {self.mtbf:g} s, and a tax of {tax:.3g} s, this loses the least"
            wanted.append((daly(tax, self.mtbf) + tax, "failures", text))
        seconds, limit, why = max(wanted)
        return Interval(seconds, math.ceil(seconds / step - 1e-9) if step else None, limit, why)


@dataclass(frozen=True, slots=True)
class Interval:
    """How often `Auto` saves, and why."""

    seconds: float
    """From one save to the next."""
    steps: int | None
    """About as many steps as that, where steps were heard of."""
    limit: Limit
    """What forbids a shorter one: the "overhead", the "drain" of the writer, what "failures" cost, or the "step"."""
    why: str
    """The same in words, with the figures."""


class Pacer:
    """The cadence that an `Auto` asks for: what was learned, and the interval in use."""

    def __init__(self, auto: Auto) -> None:
        self._auto = auto
        self.interval: Interval | None = None

    def learn(self, measured: Measured) -> None:
        """Take the costs of one more save into account."""
        best = self._auto.interval(measured)
        if best is None:
            return
        now = self.interval
        if now is None or abs(best.seconds - now.seconds) > _LEEWAY * now.seconds:
            self.interval = best

    def due(self, moment: Moment) -> bool:
        measured = moment.measured
        if measured.in_flight:
            return False
        interval = self.interval or self._auto.interval(measured)
        if measured.saves >= _LEARNING and interval is not None:
            return moment.since_save >= interval.seconds
        if measured.quiet_steps is None:
            return moment.since_save >= _UNHEARD
        return measured.quiet_steps >= _QUIET_STEPS


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
