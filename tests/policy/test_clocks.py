"""Parts on clocks of their own: which parts a save takes. Pure, on a clock that the test moves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from asyncckpt.policy.cadence import Every, Measured
from asyncckpt.policy.clocks import Clocks

NAMES = ["model", "ema", "optimizer", "rng"]
INTERVALS = st.dictionaries(st.sampled_from(NAMES[:3]), st.integers(1, 12), min_size=1)


@dataclass
class Run:
    """A run whose unnamed parts go with every save. `at` has the steps at which each part was saved."""

    clocks: Clocks

    def __post_init__(self) -> None:
        self.saves: dict[int, list[str]] = {}
        self.at: dict[str, list[int]] = {name: [] for name in NAMES}

    def step(self, step: int, ends_well: bool = True) -> None:
        due = self.clocks.due(step, float(step), Measured())
        parts = self.clocks.chosen(NAMES, due, bool(due))
        if parts:
            self.saves[step] = parts
            number = self.clocks.saved(parts, float(step))
            if not ends_well:
                self.clocks.came_to_nothing(number)
                return
            for part in parts:
                self.at[part].append(step)


def started(intervals: Mapping[str, int]) -> Run:
    return Run(Clocks({name: Every(steps=n) for name, n in intervals.items()}, 0.0))


@given(INTERVALS)
def test_a_part_is_saved_when_its_clock_says_so_and_the_others_with_every_save(intervals: dict[str, int]) -> None:
    run = started(intervals)
    for step in range(1, 60):
        run.step(step)
    assert sorted(run.saves) == [s for s in range(1, 60) if any(s % n == 0 for n in intervals.values())]
    for name, n in intervals.items():
        assert {s for s in range(1, 60) if s % n == 0} <= set(run.at[name])
    for name in set(NAMES) - set(intervals):
        assert run.at[name] == sorted(run.saves)


@given(INTERVALS)
def test_a_complete_save_comes_first_and_then_as_often_as_the_slowest_clock_says(intervals: dict[str, int]) -> None:
    run = started(intervals)
    for step in range(1, 60):
        run.step(step)
    slowest = max(intervals.values())
    complete = [step for step, parts in run.saves.items() if parts == NAMES]
    assert complete[0] == min(run.saves)
    for step in range(slowest, 60, slowest):
        assert any(step - slowest < done <= step for done in complete)


@given(st.integers(1, 12), st.integers(2, 5))
def test_a_slow_part_does_not_go_with_a_fast_one(fast: int, times: int) -> None:
    run = started({"model": fast, "optimizer": fast * times})
    for step in range(1, 100):
        run.step(step)
    assert run.at["optimizer"] == [s for i, s in enumerate(run.at["model"]) if i == 0 or s % (fast * times) == 0]


@given(INTERVALS, st.sets(st.integers(1, 60)))
def test_what_came_to_nothing_goes_with_the_next_save(intervals: dict[str, int], failing: set[int]) -> None:
    run = started(intervals)
    owed: list[str] = []
    for step in range(1, 61):
        run.step(step, step not in failing)
        if step in run.saves:
            assert set(owed) <= set(run.saves[step])
            owed = run.saves[step] if step in failing else []


@given(st.sets(st.integers(0, 40)))
def test_saves_that_come_to_nothing_do_not_make_slow_parts_fast(failing: set[int]) -> None:
    """The slow part goes once early, and when it is due, or after one of its own saves came to nothing."""
    run = started({"model": 1, "optimizer": 10})
    owed = True
    for step in range(1, 41):
        run.step(step, step not in failing)
        assert ("optimizer" in run.saves[step]) == (owed or step % 10 == 0)
        if "optimizer" in run.saves[step]:
            owed = step in failing


@given(INTERVALS, st.sets(st.sampled_from(NAMES)))
def test_a_restore_counts_as_a_save_and_stale_parts_as_an_earlier_one(
    intervals: dict[str, int], stale: set[str]
) -> None:
    run = started(intervals)
    run.clocks.saved(stale, 0.0)
    run.clocks.saved([name for name in NAMES if name not in stale], 0.0)
    run.step(first := min(intervals.values()))
    due = {name for name, n in intervals.items() if first % n == 0} | (set(NAMES) - set(intervals))
    expected = set(NAMES) if due & stale and stale != set(NAMES) else due
    assert expected - stale <= set(run.saves[first]) <= expected | due
    assert not (set(run.saves[first]) - due) & stale


def test_minutes_are_counted_from_the_last_save_of_the_part_itself() -> None:
    clocks = Clocks({"model": Every(minutes=1), "optimizer": Every(minutes=10)}, 0.0)
    clocks.saved(["model", "optimizer"], 0.0)
    found: dict[str, list[int]] = {"model": [], "optimizer": []}
    for minute in range(1, 31):
        parts = clocks.chosen(list(found), clocks.due(minute, minute * 60.0, Measured()), False)
        clocks.saved(parts, minute * 60.0)
        for part in parts:
            found[part].append(minute)
    assert found == {"model": list(range(1, 31)), "optimizer": [10, 20, 30]}
