"""Whether copying during the next step, or before `save` returns, costs the training less: found by trying both."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

_ROUNDS = 3
_ORDER = (True, False, False, True, True, False)
"""Overlapped or not, in turn A B B A A B, so that a drift of the machine favours neither."""


@dataclass
class OverlapTrial:
    """The choice behind `overlap="auto"`.

    A cost is the seconds that one save added: the wall time from `save` until it is committed, less what the
    same number of steps takes with nothing in flight. The first save (fresh arenas) is not counted.
    """

    _costs: dict[bool, list[float]] = field(default_factory=lambda: {True: [], False: []})
    _started: int = 0
    choice: bool | None = None

    def next(self) -> bool:
        """Whether the next save is to overlap."""
        if self.choice is not None:
            return self.choice
        turn = max(self._started - 1, 0) % len(_ORDER)
        self._started += 1
        return _ORDER[turn]

    def record(self, overlapped: bool, cost: float) -> None:
        """Add what a save cost; after three of each kind the cheaper by median is kept."""
        if self.choice is not None:
            return
        self._costs[overlapped].append(cost)
        if all(len(costs) >= _ROUNDS for costs in self._costs.values()):
            self.choice = statistics.median(self._costs[True]) <= statistics.median(self._costs[False])
