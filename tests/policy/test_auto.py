"""`Auto` finds the best interval from what it can see of a training, in simulated time."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from asyncckpt.policy.auto import Auto, Interval
from asyncckpt.policy.cadence import Measured
from asyncckpt.policy.plan import daly
from asyncckpt.schedule import Schedule


@dataclass
class Costs:
    """What is true of a training, and not told to anybody."""

    step: float = 0.5
    noise: float = 0.02
    """Standard deviation of a step, as a share of it."""
    blocked: float = 0.05
    """Seconds that `save` takes."""
    slowdown: float = 1.3
    """How much longer steps take while a save is in flight."""
    flight: float = 2.0
    """Seconds from `save` until it is committed."""

    @property
    def tax(self) -> float:
        return self.blocked + (self.flight - self.blocked) * (1 - 1 / self.slowdown)

    def best(self, auto: Auto) -> float:
        """The interval that costs least of those that keep the bounds."""
        bounds = [self.step, self.tax / auto.max_overhead, self.flight]
        return max([*bounds, optimum(self.tax, auto.mtbf)] if auto.mtbf else bounds)


@dataclass
class Training:
    """Steps, and saves in flight, in time that only the simulation moves. Calls the Schedule as a Checkpointer does."""

    auto: Auto
    costs: Costs
    seed: int = 0
    pause_every: int = 10**9
    """Steps from one evaluation, as long as 200 steps, to the next."""
    now: float = 0.0
    step: int = 0
    lands: float | None = None
    saved: list[float] = field(default_factory=list)
    """When `save` was called."""
    committed: int = 0
    lost: float = 0.0
    """Time that saves have cost."""
    first: float = 1.0
    """How many times as long the first save blocks."""
    cold: int = 0
    """Steps of a warm-up, which take four times as long."""

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.schedule = Schedule(self.auto, now=lambda: self.now)

    def run(self, saves: int) -> None:
        """Train until the end of the step in which the last of that many more saves is committed."""
        until = self.committed + saves
        while self.committed < until:
            self._step()

    def _step(self) -> None:
        self.step += 1
        longer = 4 if self.step <= self.cold else 1
        self._work(max(0.1, self.random.gauss(1, self.costs.noise)) * self.costs.step * longer)
        if self.step % self.pause_every == 0:
            self._work(200 * self.costs.step)
        meter = self.schedule.meter
        meter.step_ends()
        if self.schedule.decide(self.step):
            self.saved.append(self.now)
            self.schedule.save_begins()
            meter.save_begins(True)
            self.lands = self.now + self.costs.flight + (self.first - 1) * self.costs.blocked * (len(self.saved) == 1)
            blocked = self.costs.blocked * (self.first if len(self.saved) == 1 else 1)
            self.now += blocked
            self.lost += blocked
            meter.save_returns(blocked)

    def _work(self, seconds: float) -> None:
        """Compute what takes `seconds` when nothing is in flight."""
        if self.lands is not None:
            slow = min(seconds * self.costs.slowdown, self.lands - self.now)
            self.now += slow
            self.lost += slow * (1 - 1 / self.costs.slowdown)
            seconds -= slow / self.costs.slowdown
            if self.now >= self.lands:
                self.lands = None
                self.committed += 1
                self.schedule.meter.save_ends(committed=True)
        self.now += seconds

    @property
    def seconds(self) -> float:
        assert self.schedule.interval is not None
        return self.schedule.interval.seconds


def optimum(cost: float, mtbf: float) -> float:
    """The interval with the least expected time per useful second, by search: failures come as a Poisson process, and
    each takes all work since the last save. (Restarts cost the same at any interval, and are left out.)
    """

    def expected(work: float) -> float:
        return mtbf * math.expm1((work + cost) / mtbf) / work

    low, high = 1e-6 * mtbf, 20 * mtbf
    for _ in range(200):
        a, b = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, b) if expected(a) < expected(b) else (a, high)
    return low + cost


CASES = {
    "overhead": (Auto(max_overhead=0.01), Costs()),
    "overhead, noisy": (Auto(max_overhead=0.01), Costs(noise=0.05)),
    "a larger share": (Auto(max_overhead=0.05), Costs()),
    "eager": (Auto(), Costs(blocked=1.5, slowdown=1.02)),
    "long steps": (Auto(), Costs(step=20.0, blocked=1.0, slowdown=1.2, flight=30.0)),
    "short steps": (Auto(), Costs(step=0.004, blocked=0.01)),
    "slow storage": (Auto(max_overhead=0.05), Costs(flight=120.0, slowdown=1.01, noise=0.005)),
    "failures": (Auto(mtbf=3600.0), Costs(blocked=0.1, slowdown=1.1)),
    "failures, no bound": (Auto(max_overhead=0.5, mtbf=600.0), Costs()),
}
LIMITS = {"slow storage": "drain", "failures": "failures", "failures, no bound": "failures"}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", CASES)
def test_after_five_saves_it_is_near_the_best_and_again_when_the_tax_doubles(name: str, seed: int) -> None:
    auto, costs = CASES[name]
    training = Training(auto, costs, seed)
    training.run(saves=5)
    assert training.seconds == pytest.approx(costs.best(auto), rel=0.1)
    assert training.schedule.interval is not None
    assert training.schedule.interval.limit == LIMITS.get(name, "overhead")
    doubled = Costs(costs.step, costs.noise, 2 * costs.blocked, costs.slowdown, 2 * costs.flight)
    assert doubled.tax == pytest.approx(2 * costs.tax)
    training.costs = doubled
    training.run(saves=5)
    assert training.seconds == pytest.approx(doubled.best(auto), rel=0.1)


def test_all_saves_together_take_the_share_that_was_allowed() -> None:
    training = Training(Auto(max_overhead=0.01), Costs(noise=0.05))
    training.run(saves=100)
    assert training.lost / training.now == pytest.approx(0.01, rel=0.1)


def test_the_first_save_and_evaluations_in_between_mislead_it_not() -> None:
    """The first one takes fresh memory; an evaluation of 200 steps now and then lies within a save, too."""
    training = Training(Auto(), Costs(), pause_every=37, first=20.0)
    training.run(saves=8)
    assert training.seconds == pytest.approx(training.costs.best(training.auto), rel=0.1)


@pytest.mark.parametrize("seed", range(5))
def test_a_warm_up_does_not_make_saves_look_free(seed: int) -> None:
    training = Training(Auto(max_overhead=0.02), Costs(blocked=0.02, flight=0.4), seed, cold=8)
    training.run(6)
    assert training.seconds == pytest.approx(training.costs.best(training.auto), rel=0.15)


def test_the_second_save_counts_and_the_first_does_not() -> None:
    """The first one here blocks for 20 s, the others for 0.05 s."""
    training = Training(Auto(), Costs(noise=0.005), first=400.0)
    training.run(saves=2)
    assert training.seconds == pytest.approx(training.costs.best(training.auto), rel=0.1)


def test_an_evaluation_in_every_flight_is_not_taken_for_its_cost() -> None:
    """It takes 100 s of each 140 s, and the writer is at work for 60 s after each save."""
    training = Training(Auto(), Costs(flight=60.0, slowdown=1.1), pause_every=80)
    training.run(saves=8)
    assert training.seconds < 2 * training.costs.best(training.auto)


def test_it_does_not_hunt() -> None:
    """With costs that stay, the interval is left alone after the first few saves."""
    training = Training(Auto(), Costs())
    training.run(saves=8)
    seen = []
    for _ in range(30):
        training.run(saves=1)
        seen.append(training.seconds)
    assert len(set(seen)) <= 5


def test_it_never_saves_while_a_save_is_in_flight() -> None:
    training = Training(Auto(max_overhead=0.9), Costs(flight=7.0, slowdown=1.0, blocked=0.01))
    training.run(saves=20)
    assert min(b - a for a, b in itertools.pairwise(training.saved)) >= 7.0
    assert training.schedule.interval is not None and training.schedule.interval.limit == "drain"


def test_where_saves_cost_next_to_nothing_every_step_is_saved() -> None:
    training = Training(Auto(), Costs(blocked=0.0001, slowdown=1.0, flight=0.1, noise=0.0))
    training.run(saves=20)
    assert training.schedule.interval is not None
    assert (training.schedule.interval.limit, training.schedule.interval.steps) == ("step", 1)
    assert training.step < 40


def test_asking_does_not_change_the_answer() -> None:
    """One training is asked ten times a step, the other once; they save at the same steps."""

    class Asked(Training):
        def _step(self) -> None:
            for _ in range(9):
                self.schedule.decide(self.step)
            super()._step()

    trainings = [kind(Auto(max_overhead=0.1), Costs()) for kind in (Training, Asked)]
    for training in trainings:
        training.run(saves=10)
    assert trainings[0].saved == trainings[1].saved


def test_a_save_that_fails_is_not_taken_for_a_cheap_one_and_does_not_make_it_save_all_the_time() -> None:
    now = itertools.count()
    schedule = Schedule(Auto(), now=lambda: float(next(now)))
    tries = 0
    for step in range(1000):
        schedule.meter.step_ends()
        if schedule.decide(step):
            tries += 1
            schedule.save_begins()
            schedule.meter.save_begins(False)
            schedule.meter.save_returns(1.0)
            schedule.meter.save_ends(committed=False)
    assert schedule.interval is None
    assert 2 <= tries < 30


def test_without_any_step_heard_of_it_saves_by_time() -> None:
    now = 0.0
    schedule = Schedule(Auto(), now=lambda: now)
    assert schedule.decide(1) is None
    now = 61.0
    assert schedule.decide(1)


def test_it_says_what_it_chose_and_why() -> None:
    auto = Auto(max_overhead=0.02, mtbf=3600)
    measured = Measured(step=0.5, tax=1.5, to_committed=20.0)
    assert auto.interval(measured) == Interval(
        pytest.approx(daly(1.5, 3600) + 1.5),
        math.ceil((daly(1.5, 3600) + 1.5) / 0.5),
        "failures",
        "with a failure every 3600 s, and a tax of 1.5 s, this loses the least",
    )
    told = Auto(max_overhead=0.001).interval(measured)
    assert told is not None and told.limit == "overhead" and told.seconds == pytest.approx(1500)
    assert "1.5 s" in told.why and "0.1 %" in told.why
    assert auto.interval(Measured(step=0.5)) is None


@pytest.mark.parametrize("cost", [0.001, 0.1, 1.0, 30.0, 300.0])
@pytest.mark.parametrize("mtbf", [600.0, 3600.0, 1e5, 1e7])
def test_dalys_estimate_is_the_optimum_that_a_search_finds(cost: float, mtbf: float) -> None:
    assert daly(cost, mtbf) + cost == pytest.approx(optimum(cost, mtbf), rel=0.02)


@pytest.mark.parametrize(
    "arguments",
    [{"max_overhead": value} for value in (0, 1, -0.1, 2, math.nan, math.inf, "0.1", None, True)]
    + [{"mtbf": value} for value in (0, -1, math.nan, math.inf, "3600", True)],
)
def test_auto_refuses_what_makes_no_sense(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Auto(**arguments)
