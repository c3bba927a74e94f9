"""The planner: its formulas against the simulator and against each other where they hold, and the published anchors."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from asyncckpt.policy import plan as planning
from asyncckpt.policy.plan import (
    DAY,
    PUBLISHED_RATE,
    Job,
    daly,
    estimate,
    ettr,
    mtbf_of,
    mtbf_seen,
    optimum,
    plan,
    young,
)
from asyncckpt.policy.simulate import exponential, of_nodes, simulate

HOUR = 3600.0
NODES = 2048
"""Those of 16,384 GPUs."""
JOBS = {
    "large": Job(mtbf=6490, tax=1, write=30, restart=300),
    "blocking": Job(mtbf=3600, tax=120, write=120, restart=600),
    "slow storage": Job(mtbf=2000, tax=2, write=300, restart=60),
    "bench": Job(mtbf=30, tax=0.05, write=0.1, restart=3),
    "outlived": Job(mtbf=100, tax=2, write=20, restart=30, exposed=1),
    "latency": Job(mtbf=500, tax=1, write=5, latency=40, restart=20),
    "restarts as long as lives": Job(mtbf=100, tax=1, write=4, restart=120),
}
TIMES = st.floats(0.01, 1e6)


def test_the_published_failure_rates_give_the_published_times_between_failures() -> None:
    """16,384 GPUs: 1.8 h; 131,072: 0.23 h (Kokolis et al.). Llama 3: 419 interruptions in 54 days, 3.09 h."""
    assert mtbf_of(NODES, PUBLISHED_RATE) / HOUR == pytest.approx(1.8, abs=0.005)
    assert mtbf_of(131_072 // 8, PUBLISHED_RATE) / HOUR == pytest.approx(0.23, abs=0.005)
    assert mtbf_seen(419, 54) / HOUR == pytest.approx(3.09, abs=0.005)


def test_simulated_nodes_that_fail_each_on_its_own_give_them_too() -> None:
    failures = list(itertools.islice(of_nodes(NODES, PUBLISHED_RATE, seed=0), 4000))
    assert failures[-1] / len(failures) / HOUR == pytest.approx(1.8, rel=0.05)


def test_the_simulated_llama_3_run_has_its_interruptions_and_its_goodput() -> None:
    """It reports 419 interruptions in 54 days, and more than 90 % effective training time."""
    job = Job(mtbf=mtbf_seen(419, 54), tax=1, write=60, restart=600)
    runs = [
        sum(1 for _ in itertools.takewhile(lambda at: at < 54 * DAY, exponential(job.mtbf, seed))) for seed in range(40)
    ]
    assert sum(runs) / len(runs) == pytest.approx(419, rel=0.05)
    assert simulate(job, plan(job).interval, exponential(job.mtbf, 0), count=419).goodput > 0.9


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("name", JOBS)
def test_the_exact_form_is_what_the_simulator_plays(name: str, times: float) -> None:
    job = JOBS[name]
    interval = plan(job).interval * times
    found = estimate(job, interval)
    played = simulate(job, interval, exponential(job.mtbf, 3), count=3000)
    assert played.goodput == pytest.approx(found.goodput, rel=0.05)
    assert played.kept == pytest.approx(found.kept, rel=0.05)
    assert played.down / played.wall == pytest.approx(found.restarting, rel=0.05)
    assert played.taxed / played.wall == pytest.approx(found.taxed, rel=0.05)
    assert played.waited == 0
    assert played.worked + played.taxed + played.down == pytest.approx(played.wall)


def test_failures_of_single_nodes_and_exponential_ones_give_the_same_goodput() -> None:
    job = replace(JOBS["large"], mtbf=mtbf_of(NODES, PUBLISHED_RATE))
    interval = plan(job).interval
    played = simulate(job, interval, of_nodes(NODES, PUBLISHED_RATE, seed=1), count=2000)
    assert played.goodput == pytest.approx(estimate(job, interval).goodput, rel=0.05)


def test_the_published_forms_hold_where_they_should() -> None:
    """Daly's is near the optimum while tax < mtbf / 2, Young's and the ETTR while all is small against the MTBF."""
    for share in (1e-6, 1e-4, 1e-2, 0.1, 0.5):
        assert daly(share * HOUR, HOUR) == pytest.approx(optimum(share * HOUR, HOUR), rel=0.05)
    for share in (1e-6, 1e-5, 1e-4):
        assert young(share * HOUR, HOUR) == pytest.approx(optimum(share * HOUR, HOUR), rel=0.05)
    blocking = Job(mtbf=mtbf_of(NODES, PUBLISHED_RATE), tax=10, write=10, restart=120)
    interval = young(blocking.tax, blocking.mtbf)
    published = ettr(interval, blocking.tax, blocking.mtbf, blocking.restart)
    assert published == pytest.approx(estimate(blocking, interval + blocking.tax).goodput, rel=0.05)
    played = simulate(blocking, interval + blocking.tax, exponential(blocking.mtbf, 0), count=3000)
    assert published == pytest.approx(played.goodput, rel=0.05)


@given(TIMES, TIMES, st.floats(0, 1e6), st.floats(0, 1e6), st.floats(1.01, 1e4))
def test_shares_add_up_and_nothing_beats_the_optimum(
    mtbf: float, tax: float, write: float, restart: float, factor: float
) -> None:
    assume(tax < 1e4 * mtbf)
    job = Job(mtbf=mtbf, tax=tax, write=write, restart=restart)
    best = plan(job)
    found = best.estimate
    shares = (found.goodput, found.restarting, found.taxed, found.repeated, found.exposed)
    assert sum(shares) == pytest.approx(1)
    assert all(-1e-12 <= share <= 1 for share in (*shares, found.kept))
    assert estimate(job, best.interval * factor).goodput <= found.goodput * (1 + 1e-9)
    assert best.interval >= write
    free = replace(job, write=0)
    shorter = tax + optimum(tax, mtbf) / factor
    assume(shorter > tax)
    assert estimate(free, shorter).goodput <= plan(free).estimate.goodput * (1 + 1e-9)


@pytest.mark.parametrize(
    "worse", [{"tax": 3.0}, {"write": 90.0}, {"restart": 600.0}, {"mtbf": 2000.0}, {"latency": 60.0}]
)
def test_whatever_gets_worse_costs_goodput(worse: dict[str, float]) -> None:
    job = JOBS["large"]
    assert plan(replace(job, **worse)).estimate.goodput < plan(job).estimate.goodput  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "limit", "interval"),
    [
        ({}, "failures", optimum(1, 6490) + 1),
        ({"write": 200.0}, "bandwidth", 200.0),
        ({"write": 100.0, "latency": 300.0}, "queue", 200.0),
        ({"write": 100.0, "latency": 300.0, "max_in_flight": 4}, "failures", optimum(1, 6490) + 1),
        ({"max_overhead": 0.002}, "overhead", 500.0),
        ({"step": 900.0}, "step", 900.0),
        ({"step": 80.0}, "failures", 160.0),
        ({"write": 160.0, "step": 80.0}, "bandwidth", 160.0),
    ],
)
def test_the_plan_says_what_limits_it(change: dict[str, Any], limit: str, interval: float) -> None:
    found = plan(replace(JOBS["large"], **change))
    assert (found.limit, found.interval) == (limit, pytest.approx(interval))


def test_saves_faster_than_the_storage_wait_in_the_simulator() -> None:
    """What `bandwidth` and `queue` stand for: below those intervals the training only waits."""
    for change in ({"write": 200.0}, {"write": 1.0, "latency": 400.0}):
        job = replace(JOBS["large"], **change)
        floor = plan(job).interval
        played = simulate(job, floor / 2, exponential(job.mtbf, 0), count=300)
        assert played.waited > 0.4 * played.worked
        assert simulate(job, floor * 1.001, exponential(job.mtbf, 0), count=300).waited == 0


def test_a_restart_that_fails_begins_again() -> None:
    job = JOBS["restarts as long as lives"]
    assert plan(job).estimate.restarting == pytest.approx(1 - math.exp(-1.2))


def test_the_costliest_loss_is_named() -> None:
    assert plan(JOBS["large"]).costliest == "restarting"
    assert plan(JOBS["blocking"]).costliest == "restarting"
    assert plan(Job(mtbf=3600, tax=60, write=60, restart=0)).costliest in ("taxed", "repeated")
    assert plan(Job(mtbf=1000, tax=0.1, write=500, latency=300, restart=0)).costliest == "exposed"


NOT_NUMBERS = [0, -1, float("nan"), float("inf"), "3", None, True]


@pytest.mark.parametrize("value", NOT_NUMBERS)
@pytest.mark.parametrize(
    "name", ["mtbf", "tax", "write", "restart", "latency", "step", "max_in_flight", "max_overhead", "exposed"]
)
def test_a_job_refuses_what_makes_no_sense(name: str, value: Any) -> None:
    optional = {"tax", "write", "restart", "latency", "step", "exposed"}
    if (value == 0 and value is not False and name in optional) or (
        value is None and name in ("max_overhead", "exposed")
    ):
        replace(JOBS["large"], **{name: value})
        return
    with pytest.raises(ValueError, match=name):
        replace(JOBS["large"], **{name: value})


def test_a_job_that_nothing_bounds_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing bounds"):
        Job(mtbf=100, tax=0, write=0, restart=0)
    assert plan(Job(mtbf=100, tax=0, write=2, restart=0)).interval == 2


@pytest.mark.parametrize("value", NOT_NUMBERS)
def test_the_formulas_refuse_what_makes_no_sense(value: Any) -> None:
    with pytest.raises(ValueError, match="nodes"):
        mtbf_of(value, 1e-3)
    with pytest.raises(ValueError, match="failures_per_node_day"):
        mtbf_of(8, value)
    with pytest.raises(ValueError, match="days"):
        mtbf_seen(3, value)
    for formula in (young, daly, optimum):
        with pytest.raises(ValueError, match="mtbf"):
            formula(1, value)
    with pytest.raises(ValueError, match="interval"):
        planning.estimate(JOBS["large"], value)


def test_an_interval_of_nothing_but_tax_is_refused() -> None:
    with pytest.raises(ValueError, match="not longer than the tax"):
        estimate(JOBS["blocking"], 120)
