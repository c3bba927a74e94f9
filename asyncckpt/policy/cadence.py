"""When `maybe_save` saves."""

from __future__ import annotations

from dataclasses import dataclass


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

    def due(self, step: int, seconds_since_save: float) -> bool:
        """Whether to save now; `seconds_since_save` counts from the last save, or from the start."""
        by_step = self.steps is not None and step % self.steps == 0
        return by_step or (self.minutes is not None and seconds_since_save >= 60 * self.minutes)
