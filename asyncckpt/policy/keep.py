"""Which checkpoints stay."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Keep:
    """Keep the `last` N checkpoints, or those whose step is a multiple of `every`. Clauses are joined by *or*.

    Whatever the clauses say, the newest verified checkpoint is never deleted.

    Raises:
        ValueError: `last` or `every` below 1.
    """

    last: int = 3
    every: int | None = None

    def __post_init__(self) -> None:
        for name in ("last", "every"):
            value = getattr(self, name)
            if name == "every" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"Keep({name}={value!r}): give a whole number from 1 on")

    def retire(self, steps: Iterable[int]) -> list[int]:
        """Those of `steps` that no clause keeps, oldest first."""
        ordered = sorted(steps)
        kept = set(ordered[-self.last :])
        return [s for s in ordered if s not in kept and not (self.every and s % self.every == 0)]
