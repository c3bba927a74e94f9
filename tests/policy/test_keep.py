"""Which checkpoints stay, as properties of records alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncckpt.policy.keep import Keep, judge, sound
from asyncckpt.policy.records import Record

COUNTS = st.integers(1, 8)
THEN = datetime(2026, 1, 1, tzinfo=UTC)
HOURS = st.integers(-10 * 365 * 24, 10 * 365 * 24)
"""Clocks that are up to ten years off, either way."""
NUMBERS = st.sampled_from([math.nan, math.inf, -math.inf, -1.0, 0.0, 0.5, 1.0, 2.0])
KEEPS = st.builds(
    lambda last, every, within, best, mode: Keep(last, every, within, best, "loss" if best else None, mode),
    COUNTS,
    st.none() | COUNTS,
    st.none() | st.integers(1, 10**5).map(lambda hours: timedelta(hours=hours)),
    st.none() | COUNTS,
    st.sampled_from(["min", "max"]),
)


@st.composite
def runs(draw: st.DrawFn, *, plain: bool = False) -> list[Record]:
    """The records of a run; `plain` ones are all complete, finite, on one branch and beyond doubt."""
    steps = sorted(draw(st.sets(st.integers(0, 60), max_size=12)))
    flag = st.just(False) if plain else st.sampled_from([False, False, False, True])
    sequences = draw(st.permutations(range(len(steps)))) if not plain else range(len(steps))
    times = sorted(draw(st.lists(HOURS, min_size=len(steps), max_size=len(steps)))) if plain else None
    found = []
    for i, step in enumerate(steps):
        hours = times[i] if times is not None else draw(st.none() | HOURS)
        damaged = draw(flag)
        found.append(
            Record(
                step=step,
                sequence=sequences[i],
                created=None if hours is None else THEN + timedelta(hours=hours),
                omitted=("optimizer",) if draw(flag) else (),
                metrics=draw(st.fixed_dictionaries({}, optional={"loss": NUMBERS, "other": NUMBERS})),
                pinned=draw(flag),
                finite=True if plain else draw(st.none() | st.booleans()),
                rewound=draw(flag),
                damaged=damaged,
                doubt="can't be read" if damaged or draw(flag) else "",
            )
        )
    return found


def kept(records: Sequence[Record], keep: Any) -> set[int]:
    return {step for step, verdict in judge(records, keep).items() if verdict.stays}


@given(runs(plain=True), COUNTS, st.none() | COUNTS)
def test_the_last_and_the_multiples_stay_and_nothing_else(records: list[Record], last: int, every: int | None) -> None:
    steps = [r.step for r in records]
    assert kept(records, Keep(last, every)) == {*steps[-last:], *(s for s in steps if every and s % every == 0)}


@given(runs(), KEEPS)
def test_what_no_policy_may_delete_stays(records: list[Record], keep: Keep) -> None:
    """Under any clauses, any clock, and a policy that would delete everything."""
    for policy in (keep, lambda candidates: [r.step for r in candidates]):
        stays = kept(records, policy)
        whole = [r.step for r in records if r.complete and not r.rewound and not r.damaged]
        healthy = [r.step for r in records if r.step in whole and sound(r)]
        assert stays >= {r.step for r in records if r.pinned or r.doubt or r.damaged}
        assert stays >= {*whole[-1:], *healthy[-1:]}


@given(runs(), KEEPS)
def test_clauses_are_joined_by_or(records: list[Record], keep: Keep) -> None:
    alone = [Keep(keep.last), Keep(1, keep.every), Keep(1, within=keep.within)]
    alone += [Keep(1, best=keep.best, metric=keep.metric, mode=keep.mode)]
    assert kept(records, keep) == set().union(*(kept(records, one) for one in alone))


@given(runs(), KEEPS)
def test_retiring_again_retires_nothing_more(records: list[Record], keep: Keep) -> None:
    stays = kept(records, keep)
    left = [r for r in records if r.step in stays]
    if not any("go backwards" in v.why or "not all known" in v.why for v in keep.explain(records).values()):
        assert kept(left, keep) == stays


@given(runs(), KEEPS)
def test_branches_that_were_left_go_and_damaged_ones_count_for_nothing(records: list[Record], keep: Keep) -> None:
    stays = kept(records, keep)
    assert not [r for r in records if r.rewound and r.step in stays and not (r.pinned or r.doubt)]
    counting = [r for r in records if not r.rewound and not r.damaged]
    assert kept(counting, keep) == stays & {r.step for r in counting}


@given(runs(), KEEPS)
def test_the_order_of_the_records_does_not_matter(records: list[Record], keep: Keep) -> None:
    assert keep.explain(records) == keep.explain(records[::-1])
    assert all(verdict.why for verdict in keep.explain(records).values())


@given(runs(plain=True), st.integers(1, 200))
def test_within_is_measured_from_the_newest(records: list[Record], hours: int) -> None:
    span = timedelta(hours=hours)
    stays = kept(records, Keep(1, within=span))
    assert stays == {r.step for r in records if records[-1].created - r.created <= span}


@given(runs(plain=True).filter(lambda records: len(records) > 1), st.data())
def test_within_deletes_nothing_when_times_run_backwards(records: list[Record], data: st.DataObject) -> None:
    """A clock that was set back, by ten years or an hour, at any commit but the first."""
    at = data.draw(st.integers(1, len(records) - 1))
    before = records[at - 1].created
    assert before is not None
    back = timedelta(hours=data.draw(st.integers(1, 10 * 365 * 24)))
    records = [*records[:at], replace(records[at], created=before - back), *records[at + 1 :]]
    assert kept(records, Keep(1, within=timedelta(hours=1))) == {r.step for r in records}


@given(runs(plain=True), COUNTS, st.sampled_from(["min", "max"]))
def test_the_best_stay_and_only_finite_numbers_count(records: list[Record], best: int, mode: Any) -> None:
    records = [replace(r, metrics={"loss": r.metrics.get("loss", 3.0)}) for r in records]
    finite = [r for r in records if math.isfinite(r.metrics["loss"])]
    ranked = sorted(finite, key=lambda r: (r.metrics["loss"] if mode == "min" else -r.metrics["loss"], -r.step))
    expected = {r.step for r in [*ranked[:best], *records[-1:]]}
    assert kept(records, Keep(1, best=best, metric="loss", mode=mode)) == expected


@given(runs(plain=True), COUNTS)
def test_nothing_goes_for_a_metric_that_may_still_come(records: list[Record], best: int) -> None:
    stays = kept(records, Keep(1, best=best, metric="loss"))
    having = [r.step for r in records if "loss" in r.metrics]
    newest = max(having, default=-1)
    assert stays >= {r.step for r in records if r.step > newest}
    assert kept(records, Keep(1, best=best, metric="misspelt")) == {r.step for r in records}


@given(runs(), KEEPS, st.data())
def test_what_is_in_doubt_deletes_nothing_else(records: list[Record], keep: Keep, data: st.DataObject) -> None:
    """Notes that can't be read any more take pin and metrics with them; all that stayed before stays."""
    if records:
        lost = data.draw(st.sampled_from(records))
        after = replace(lost, metrics={}, pinned=False, doubt="can't be read")
        assert kept([after if r is lost else r for r in records], keep) >= kept(records, keep)


@given(st.lists(st.booleans(), max_size=20), COUNTS)
def test_last_counts_complete_ones(complete: list[bool], last: int) -> None:
    records = [Record(step, omitted=() if whole else ("optimizer",)) for step, whole in enumerate(complete)]
    stays = kept(records, Keep(last))
    whole = [r.step for r in records if r.complete]
    lacking = [r.step for r in records if not r.complete and r.step > max(whole, default=-1)]
    assert stays == {*whole[-last:], *lacking[-last:]}


@given(runs())
def test_without_a_policy_all_stay(records: list[Record]) -> None:
    assert kept(records, None) == {r.step for r in records}


@pytest.mark.parametrize("value", [0, -1, 1.5, 3.0, "3", True, False, float("nan")])
def test_a_count_that_is_none_is_refused(value: Any) -> None:
    for name in ("last", "every", "best"):
        with pytest.raises(ValueError, match=rf"Keep\({name}=.*whole number"):
            Keep(**{name: value, "metric": "loss"})


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"last": None}, ValueError, "whole number"),
        ({"best": 1}, ValueError, "metric="),
        ({"best": 1, "metric": ""}, ValueError, "metric="),
        ({"metric": "loss"}, ValueError, "best="),
        ({"best": 1, "metric": 7}, TypeError, "name of a metric"),
        ({"best": 1, "metric": "loss", "mode": "least"}, ValueError, "'min' or 'max'"),
        ({"within": 3600}, TypeError, "timedelta"),
        ({"within": timedelta(0)}, ValueError, "positive"),
        ({"within": timedelta(hours=-1)}, ValueError, "positive"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        Keep(**arguments)
