"""When each part of the state is saved, where parts have clocks of their own."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from asyncckpt.policy.cadence import Cadence, Measured, Moment


class Clocks:
    """The clocks of parts, by name, and which save of each part was its last. `now` is in seconds, of any one clock.

    A part that is due takes along those that were saved since its own last save, and those whose last save came to
    nothing or that were never saved: so there is a complete save at least as often as the slowest clock says.
    """

    def __init__(self, clocks: Mapping[str, Cadence], now: float) -> None:
        self.named = dict(clocks)
        self._begun = now
        self._saves = 0
        self._last: dict[str, tuple[int, int]] = {}
        """By part, the numbers of its last save, and of the one before that did not come to nothing; 0 for none."""
        self._times: dict[str, float] = {}
        self._void: set[int] = set()
        """The saves that came to nothing."""

    def due(self, step: int, now: float, measured: Measured) -> frozenset[str]:
        """The parts whose own clock says so at the end of `step`."""
        moments = {name: Moment(step, now - self._times.get(name, self._begun), measured) for name in self.named}
        return frozenset(name for name, cadence in self.named.items() if cadence.due(moments[name]))

    def chosen(self, names: Collection[str], due: Collection[str], others: bool) -> list[str]:
        """Which of the parts `names` of a state to save: those in `due`, if `others` those of no clock, and more."""
        wanted = {name for name in names if name in due or (others and name not in self.named)}
        if not wanted:
            return []
        since = min(self._last_good(name) for name in wanted)
        return [name for name in names if name in wanted or self._owed(name) or self._last_good(name) > since]

    def saved(self, names: Iterable[str], now: float) -> int:
        """These parts are saved together, or have been restored. Returns the number of that save."""
        self._saves += 1
        for name in names:
            self._last[name] = self._saves, self._last_good(name)
            self._times[name] = now
        return self._saves

    def came_to_nothing(self, save: int) -> None:
        """The save of that number was skipped, replaced, or has failed. May be called from any thread."""
        self._void.add(save)

    def _last_good(self, name: str) -> int:
        save, before = self._last.get(name, (0, 0))
        return before if save in self._void else save

    def _owed(self, name: str) -> bool:
        """Whether it was never saved, or its last save came to nothing."""
        save, _ = self._last.get(name, (0, 0))
        return not save or save in self._void
