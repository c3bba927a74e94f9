import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncckpt.policy.cadence import Every, Moment
from asyncckpt.policy.overlap import OverlapTrial


@given(st.integers(0, 10_000), st.integers(1, 500), st.floats(0, 1e6), st.floats(0, 1e9))
def test_every_is_due_by_step_or_by_time(step: int, steps: int, minutes: float, seconds: float) -> None:
    minutes += 1e-3
    by_step, by_time = step % steps == 0, seconds >= 60 * minutes
    moment = Moment(step, seconds)
    assert Every(steps=steps).due(moment) == by_step
    assert Every(minutes=minutes).due(moment) == by_time
    assert Every(steps=steps, minutes=minutes).due(moment) == (by_step or by_time)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"steps": 0}, {"steps": -5}, {"steps": 1.5}, {"steps": "5"}, {"steps": True}]
    + [{"minutes": m} for m in (0, -1, float("nan"))]
    + [{"steps": 5, "minutes": 0}],
)
def test_every_refuses_what_makes_no_sense(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Every"):
        Every(**arguments)


COSTS = st.lists(st.floats(0, 100), min_size=3, max_size=3)


@given(COSTS, COSTS)
def test_the_trial_tries_both_and_keeps_the_cheaper(overlapped: list[float], eager: list[float]) -> None:
    trial = OverlapTrial()
    costs = {True: iter(overlapped), False: iter(eager)}
    trial.next()  # the first save is not counted
    ways = []
    while trial.choice is None:
        ways.append(trial.next())
        trial.record(ways[-1], next(costs[ways[-1]]))
    assert ways == [True, False, False, True, True, False]
    assert trial.choice == (sorted(overlapped)[1] <= sorted(eager)[1])
    for way in (True, False):
        trial.record(way, 0.0 if way != trial.choice else 1e9)
        assert trial.next() == trial.choice


@given(st.lists(st.booleans(), max_size=40))
def test_the_trial_ends_whatever_saves_go_uncounted(counted: list[bool]) -> None:
    trial = OverlapTrial()
    for count in itertools.chain(counted, itertools.repeat(True, 12)):
        way = trial.next()
        if count:
            trial.record(way, 1.0)
    assert trial.choice is not None
