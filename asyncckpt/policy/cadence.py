"""When `maybe_save` saves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Measured:
    """What steps take and saves cost, in seconds, as measured so far. None: not known yet."""

    step: float | None = None
    """One step, from one `maybe_save` to the next, while no save is in flight."""
    tax: float | None = None
    """What one save adds to the training: the wait in `save` and at the fence, and slower steps until it is over.

    Until that was measured, the wait in the last `save`.
    """
    to_committed: float | None = None
    """From `save` until that save is committed."""
    saves: int = 0
    """Saves begun."""
    in_flight: bool = False
    """Whether the newest save is not over."""
    quiet_steps: int | None = None
    """Steps measured since the last save was over; None where no step was heard of, by `maybe_save` or an optimizer."""


@dataclass(frozen=True, slots=True)
class Moment:
    """The end of a step, as a cadence sees it."""

    step: int
    since_save: float
    """Seconds since the last save, or since the start."""
    measured: Measured = Measured()


class Cadence(Protocol):
    """Anything with this method can be a Checkpointer's cadence."""

    def due(self, moment: Moment) -> bool:
        """Whether to save now. Called on the training thread, at least once a step, and must be quick.

        `should_save` asks, too: the answer must not depend on how often it was asked.
        """


@dataclass(frozen=True, slots=True)
class Every:
    """Every `steps` steps, or `minutes` minutes after the last save, whichever comes first.

    Raises:
        ValueError: neither is given, or one is not positive.
    """

    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise ValueError("Every(): give steps=, minutes=, or both")
        if self.steps is not None and (type(self.steps) is not int or self.steps < 1):
            raise ValueError(f"Every(steps={self.steps!r}): give a whole number from 1 on")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"Every(minutes={self.minutes!r}): give a positive number")

    def due(self, moment: Moment) -> bool:
        by_step = self.steps is not None and moment.step % self.steps == 0
        return by_step or (self.minutes is not None and moment.since_save >= 60 * self.minutes)
