"""`asyncckpt plan`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from asyncckpt.cli.answers import Answer, UsageError, table
from asyncckpt.cli.units import show_seconds, show_size
from asyncckpt.policy import plan as planning
from asyncckpt.policy.plan import Estimate, Job, Plan, estimate
from asyncckpt.policy.simulate import Played, exponential, simulate

_LIMITS = {
    "failures": "failures: saving more often would cost more than it brings back (the optimum that Young and Daly "
    "approximate)",
    "bandwidth": "bandwidth: the storage is busy that long with one save",
    "queue": "the queue: no more than so many saves may be in flight, and each takes so long",
    "overhead": "the bound on overhead: failures alone would ask for more saves",
    "step": "the length of a training step",
}
_LOSSES = {
    "restarting": "restarts",
    "taxed": "the cost of saves",
    "repeated": "work since the last save, done again",
    "exposed": "work in saves that were lost in flight, done again",
}
_REMEDIES = {
    "restarting": "restart faster, or fail less often",
    "taxed": "make a save cheaper for the training",
    "repeated": "make a save cheaper for the training, so that more of them pay",
    "exposed": "write faster, or to where a failure does not reach sooner",
}
_MOST_EVENTS = 200_000
"""Of a simulation, so that it takes about half a second."""


@dataclass(frozen=True)
class Question:
    """What the command line asked, in bytes, seconds and shares. None where it did not say."""

    state: float
    nodes: int
    failure_rate: float | None
    mtbf: float | None
    bandwidth: float | None
    total_bandwidth: float | None
    tax: float | None
    restart: float | None
    latency: float
    safe_after: float | None
    max_in_flight: int
    step: float
    max_overhead: float | None
    interval: float | None
    simulate: int


_ASSUMED = {"bandwidth": 1e9, "tax": 1.0, "restart": 300.0}
"""Where the command line says nothing: bytes per second and node, seconds, seconds."""


def plan(question: Question) -> Answer:
    """How often to save, and what that gives.

    Raises:
        UsageError: the numbers make no sense.
    """
    try:
        job, assumed = _job(question)
        best = planning.plan(job)
        asked = None if question.interval is None else estimate(job, question.interval)
    except ValueError as error:
        raise UsageError(str(error)) from None
    played = _play(best, question.simulate)
    return Answer(_data(question, best, asked, played, assumed), _lines(question, best, asked, played, assumed))


def _job(question: Question) -> tuple[Job, list[str]]:
    """The job, and what had to be assumed of it."""
    if question.state <= 0 or question.nodes < 1:
        raise UsageError("--state and --nodes: give positive numbers")
    if question.mtbf is not None and question.failure_rate is not None:
        raise UsageError("give --mtbf or --failure-rate, not both")
    assumed = []

    def given(value: float | None, name: str, text: str) -> float:
        if value is not None:
            return value
        assumed.append(text)
        return _ASSUMED[name]

    mtbf = question.mtbf
    if mtbf is None:
        rate = question.failure_rate
        if rate is None:
            rate = planning.PUBLISHED_RATE
            assumed.append(f"--failure-rate {rate:g} per node and day (Kokolis et al. 2024, RSC-1)")
        mtbf = planning.mtbf_of(question.nodes, rate)
    rates = [] if question.total_bandwidth is None else [question.total_bandwidth]
    if question.bandwidth is not None or not rates:
        rates.append(question.nodes * given(question.bandwidth, "bandwidth", "--bandwidth 1 GB/s per node"))
    if min(rates) <= 0:
        raise UsageError("--bandwidth and --total-bandwidth: give positive numbers")
    job = Job(
        mtbf=mtbf,
        tax=given(question.tax, "tax", "--tax 1 s per save"),
        write=question.state / min(rates),
        restart=given(question.restart, "restart", "--restart 5 min"),
        latency=question.latency,
        exposed=question.safe_after,
        max_in_flight=question.max_in_flight,
        step=question.step,
        max_overhead=question.max_overhead,
    )
    return job, assumed


def _play(best: Plan, failures: int) -> Played | None:
    """A simulation of so many failures, or of fewer, where they would bring too many saves."""
    count = min(failures, max(20, int(_MOST_EVENTS * best.interval / (3 * best.job.mtbf))))
    return simulate(best.job, best.interval, exponential(best.job.mtbf, 0), count=count) if failures else None


def _models(best: Plan) -> dict[str, float]:
    """What the published models say of this job: intervals in seconds, and goodput by the ETTR form."""
    job = best.job
    return {
        "young": planning.young(job.tax, job.mtbf) + job.tax,
        "daly": planning.daly(job.tax, job.mtbf) + job.tax,
        "optimum": planning.optimum(job.tax, job.mtbf) + job.tax,
        "ettr": planning.ettr(best.interval - job.tax, job.tax, job.mtbf, job.restart),
    }


def _data(
    question: Question, best: Plan, asked: Estimate | None, played: Played | None, assumed: list[str]
) -> dict[str, Any]:
    job = best.job
    return {
        "job": asdict(job) | {"commit": job.commit, "state": question.state, "nodes": question.nodes},
        "assumed": assumed,
        "interval": best.interval,
        "limit": best.limit,
        "floors": job.floors(),
        "costliest": best.costliest,
        "estimate": _shares(best.estimate),
        "models": _models(best),
        "asked": None if asked is None else _shares(asked),
        "simulated": None
        if played is None
        else {"goodput": played.goodput, "kept": played.kept, "failures": played.failures, "saves": played.saves},
    }


def _shares(found: Estimate) -> dict[str, float]:
    return asdict(found) | {"kept": found.kept}


def _lines(
    question: Question, best: Plan, asked: Estimate | None, played: Played | None, assumed: list[str]
) -> Iterator[str]:
    job, found, models = best.job, best.estimate, _models(best)
    nodes = f"{question.nodes} node{'s' if question.nodes != 1 else ''}"
    per_node = question.state / question.nodes
    yield f"{show_size(question.state)} of state on {nodes}; a failure every {show_seconds(job.mtbf)}"
    yield (
        f"a save costs the training {show_seconds(job.tax)}, is written in {show_seconds(job.write)} and safe after "
        f"{show_seconds(job.at_risk)}; {job.max_in_flight} in flight take {show_size(job.max_in_flight * per_node)} "
        "of memory per node"
    )
    if assumed:
        yield f"assumed: {'; '.join(assumed)}"
    yield ""
    yield f"save every  {show_seconds(best.interval)}"
    yield f"limited by  {_LIMITS[best.limit]}"
    yield f"goodput     {found.goodput:.2%} of the time; {found.kept:.2%} of all steps are not done twice"
    for at, (share, text) in enumerate(_losses(found)):
        yield f"{'' if at else 'lost to':12}{share:6.2%}  {text}"
    yield f"to gain     {_REMEDIES[best.costliest]}"
    yield ""
    yield from table(
        ["MODEL", "INTERVAL", "GOODPUT"],
        [
            ["Young 1974", show_seconds(models["young"]), ""],
            ["Daly 2006", show_seconds(models["daly"]), ""],
            ["exact optimum, were nothing else to limit it", show_seconds(models["optimum"]), ""],
            ["effective training time ratio, first order", show_seconds(best.interval), f"{models['ettr']:.2%}"],
            ["exact, exponential failures", show_seconds(best.interval), f"{found.goodput:.2%}"],
            *([] if played is None else [_played_row(best, played)]),
            *([] if asked is None else [["exact, as asked", show_seconds(asked.interval), f"{asked.goodput:.2%}"]]),
        ],
        right=(1, 2),
    )


def _losses(found: Estimate) -> list[tuple[float, str]]:
    """The greatest first."""
    return sorted(((float(getattr(found, name)), text) for name, text in _LOSSES.items()), reverse=True)


def _played_row(best: Plan, played: Played) -> list[str]:
    return [f"simulated, {played.failures} failures", show_seconds(best.interval), f"{played.goodput:.2%}"]
