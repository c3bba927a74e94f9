"""A training with failures, played event by event: what the formulas of `plan` are held against.

It knows no formula: failures strike at given instants; the training works, pays the tax of a save, waits for a place
in the queue, or is down; the storage writes one save after the other; a restart goes on from the newest safe save.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from asyncckpt.policy.plan import DAY, Job


def exponential(mtbf: float, seed: int) -> Iterator[float]:
    """Instants of failures, without end: gaps drawn from an exponential distribution with this mean, in seconds."""
    draw = random.Random(seed)
    at = 0.0
    while True:
        at += draw.expovariate(1 / mtbf)
        yield at


def of_nodes(nodes: int, failures_per_node_day: float, seed: int) -> Iterator[float]:
    """Instants at which any of `nodes` fails, each of them on its own, and repaired at once."""
    draw = random.Random(seed)
    rate = failures_per_node_day / DAY
    next_of = [draw.expovariate(rate) for _ in range(nodes)]
    heapq.heapify(next_of)
    while True:
        at = next_of[0]
        heapq.heapreplace(next_of, at + draw.expovariate(rate))
        yield at


@dataclass(slots=True)
class Played:
    """What became of `wall` seconds: `progress` that a restart would come back to, `worked` (done again or not),
    `taxed`, `waited` for a place in the queue, `down`. Also how many `failures` and `saves` there were.
    """

    wall: float = 0.0
    progress: float = 0.0
    worked: float = 0.0
    taxed: float = 0.0
    waited: float = 0.0
    down: float = 0.0
    failures: int = 0
    saves: int = 0

    @property
    def goodput(self) -> float:
        return self.progress / self.wall if self.wall else 0.0

    @property
    def kept(self) -> float:
        """Useful work over all work."""
        return self.progress / self.worked if self.worked else 0.0


def simulate(job: Job, interval: float, failures: Iterable[float], *, count: int) -> Played:
    """Play `job`, saving every `interval` seconds (tax included), up to the `count`-th failure, or the last."""
    game = _Game(job, interval)
    for number, at in enumerate(failures, 1):
        game.run_until(at)
        game.fail()
        if number >= count:
            break
    return game.played


@dataclass(slots=True)
class _Save:
    work: float
    safe: float
    committed: float


class _Game:
    def __init__(self, job: Job, interval: float) -> None:
        self.job, self.work = job, interval - job.tax
        self.played = Played()
        self.now = 0.0
        self._phase, self._ends = "work", self.work
        self._at = 0.0
        """Work that the training stands at."""
        self._in_flight: list[_Save] = []
        self._storage_free = 0.0

    def run_until(self, instant: float) -> None:
        """Let the phases follow each other until `instant`; the one under way then is cut short."""
        while self._ends <= instant:
            self._spend(self._ends)
            self._next_phase()
        self._spend(instant)

    def _spend(self, until: float) -> None:
        took = until - self.now
        self.now = self.played.wall = until
        if self._phase == "work":
            self._at += took
            self.played.worked += took
        elif self._phase == "tax":
            self.played.taxed += took
        elif self._phase == "wait":
            self.played.waited += took
        else:
            self.played.down += took

    def _next_phase(self) -> None:
        if self._phase in ("work", "wait"):
            self._commit()
            if len(self._in_flight) >= self.job.max_in_flight:
                self._begin("wait", self._in_flight[0].committed)
            else:
                self._save()
                self._begin("tax", self.now + self.job.tax)
        else:
            self._begin("work", self.now + self.work)

    def _begin(self, phase: str, ends: float) -> None:
        self._phase, self._ends = phase, ends

    def _save(self) -> None:
        """The storage takes one save after the other."""
        self.played.saves += 1
        self._storage_free = max(self._storage_free, self.now) + self.job.write
        committed = self._storage_free + self.job.latency
        exposed = self.job.exposed
        safe = committed if exposed is None else min(committed, self.now + exposed)
        self._in_flight.append(_Save(self._at, safe, committed))

    def _commit(self) -> None:
        """Take out of flight what is committed by now."""
        while self._in_flight and self._in_flight[0].committed <= self.now:
            self.played.progress = self._in_flight.pop(0).work

    def fail(self) -> None:
        """What is not safe is lost; the training restarts from what is."""
        self.played.failures += 1
        self._commit()
        safe = [save.work for save in self._in_flight if save.safe <= self.now]
        self.played.progress = max(safe, default=self.played.progress)
        self._in_flight.clear()
        self._storage_free = self.now
        self._at = self.played.progress
        self._begin("down", self.now + self.job.restart)
