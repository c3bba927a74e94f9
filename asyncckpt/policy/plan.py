"""How often to save, and how much of a training's time becomes progress: the published models, and one exact form.

Failures come at random at a constant rate (exponential gaps), in training and in restarts alike; a restart that a
failure hits begins again. Times are seconds. Between two saves lie `work` seconds of training and the `tax`, which is
what one save costs the training: blocked time and what its background work slows down. A save can be lost to a failure
until it is safe, `exposed` seconds after its call. For a blocking save that is the tax itself, and the form here is
Daly's; for an asynchronous one the tax is small and the exposure is the time to write.

Sources:
    J. W. Young, A first order approximation to the optimum checkpoint interval, CACM 17(9), 1974
    J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, FGCS 22(3), 2006
    A. Kokolis et al., Revisiting reliability in large-scale machine learning research clusters, HPCA 2025,
        arXiv:2410.21680 (the effective training time ratio as the measure, and 6.5e-3 failures per node-day)
    The Llama 3 herd of models, 2024, arXiv:2407.21783 (419 unexpected interruptions in 54 days)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

DAY = 86400.0
PUBLISHED_RATE = 6.5e-3
"""Failures per node (of eight GPUs) and day, in Meta's RSC-1 cluster: Kokolis et al."""


def mtbf_of(nodes: int, failures_per_node_day: float) -> float:
    """Seconds between failures of a job on `nodes` nodes, any of which ends it: 1 / (nodes x rate) (Kokolis et al.)."""
    _check("mtbf_of", nodes=nodes, failures_per_node_day=failures_per_node_day)
    return DAY / (nodes * failures_per_node_day)


def mtbf_seen(failures: int, days: float) -> float:
    """Seconds between failures where `failures` came in `days` days."""
    _check("mtbf_seen", failures=failures, days=days)
    return days * DAY / failures


def young(tax: float, mtbf: float) -> float:
    """Young's work between saves, sqrt(2 tax mtbf); good while that is far below the MTBF."""
    _check("young", zero=("tax",), tax=tax, mtbf=mtbf)
    return math.sqrt(2 * tax * mtbf)


def daly(tax: float, mtbf: float) -> float:
    """Daly's work between saves (his equation 37): Young's with two more terms; the MTBF from a tax of 2 MTBF on.

    From the start of one save to that of the next it is the tax more.
    """
    _check("daly", zero=("tax",), tax=tax, mtbf=mtbf)
    half = tax / (2 * mtbf)
    if half >= 1:
        return mtbf
    return math.sqrt(2 * tax * mtbf) * (1 + math.sqrt(half) / 3 + half / 9) - tax


def optimum(tax: float, mtbf: float) -> float:
    """The work between saves that gives the most: what both of them approximate.

    It is the root of exp((work + tax) / mtbf) (1 - work / mtbf) = 1 (Daly's cost function, differentiated). Neither
    restart nor exposure has a part in it.
    """
    _check("optimum", zero=("tax",), tax=tax, mtbf=mtbf)
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if middle + tax / mtbf + math.log1p(-middle) > 0:
            low = middle
        else:
            high = middle
    return mtbf * high if tax else 0.0


def ettr(interval: float, tax: float, mtbf: float, restart: float) -> float:
    """The effective training time ratio to first order: (1 - (restart + interval/2) / mtbf) / (1 + tax / interval).

    `interval` is the work between saves here. In a time T there are T / mtbf failures; each costs a restart and, on
    average, half of an interval's work. In what is left, each interval is followed by the tax of a save. It knows no
    exposure, no failure in a restart and no queue, and goes below zero where failures come faster than restarts.
    """
    _check("ettr", zero=("tax", "restart"), interval=interval, tax=tax, mtbf=mtbf, restart=restart)
    return (1 - (restart + interval / 2) / mtbf) / (1 + tax / interval)


@dataclass(frozen=True, slots=True)
class Job:
    """A training and its checkpoints. Times in seconds.

    `write` is how long the storage is busy with one save, `latency` what passes beside that until it is committed.
    `exposed` is given where a save is safe earlier than it is committed (a writer that outlives the trainer, and
    failures that only take the trainer). `step` is the length of a training step: a save comes between steps.
    `max_overhead` bounds the share of the time that saves may cost.

    Raises:
        ValueError: a number that makes no sense.
    """

    mtbf: float
    tax: float
    write: float
    restart: float
    latency: float = 0.0
    exposed: float | None = None
    max_in_flight: int = 2
    step: float = 0.0
    max_overhead: float | None = None

    def __post_init__(self) -> None:
        times = {name: getattr(self, name) for name in ("mtbf", "tax", "write", "restart", "latency", "step")}
        _check("Job", zero=("tax", "write", "restart", "latency", "step"), **times)
        if self.exposed is not None:
            _check("Job", zero=("exposed",), exposed=self.exposed)
        if type(self.max_in_flight) is not int or self.max_in_flight < 1:
            raise ValueError(f"Job(max_in_flight={self.max_in_flight!r}): give a whole number from 1 on")
        if self.max_overhead is not None:
            _check("Job", max_overhead=self.max_overhead)
            if self.max_overhead >= 1:
                raise ValueError(f"Job(max_overhead={self.max_overhead!r}): give a share below 1")
        if max(self.floors().values()) == 0:
            raise ValueError("Job(): nothing bounds how often it saves; give tax, write or step")

    @property
    def commit(self) -> float:
        """From the call of a save until it is committed."""
        return self.write + self.latency

    @property
    def at_risk(self) -> float:
        """From the call of a save until no failure can take it any more."""
        return self.commit if self.exposed is None else self.exposed

    def floors(self) -> dict[str, float]:
        """What the interval between saves, tax included, may not be shorter than, by what says so.

        failures   the interval that gives the most: saving more often costs more than it brings back
        bandwidth  the storage is still busy with the save before
        queue      `max_in_flight` saves are not yet committed
        overhead   saves would cost more than `max_overhead`
        step       a training step is not over
        """
        return {
            "failures": optimum(self.tax, self.mtbf) + self.tax,
            "bandwidth": self.write,
            "queue": self.commit / self.max_in_flight,
            "overhead": self.tax / self.max_overhead if self.max_overhead else 0.0,
            "step": self.step,
        }


@dataclass(frozen=True, slots=True)
class Estimate:
    """What becomes of the wall time, saving every `interval` seconds. The shares add up to one.

    `restarting`: down. `taxed`: what saves cost. `repeated`: work after the newest save that a failure took. `exposed`:
    work repeated because that save, or one before, was not safe yet. `goodput`: progress.
    """

    interval: float
    goodput: float
    restarting: float
    taxed: float
    repeated: float
    exposed: float

    @property
    def kept(self) -> float:
        """Of all the work that was done, what was not done twice: useful steps over all steps."""
        done = self.goodput + self.repeated + self.exposed
        return self.goodput / done if done else 0.0


def estimate(job: Job, interval: float) -> Estimate:
    """What saving every `interval` seconds (tax included) gives, exactly, for exponential failures.

    A life between restarts lasts X, with mean M = mtbf. The k-th save of a life is safe if X > k S - tax + exposed,
    so that it brings W (one interval's work) with the probability exp(-(k S - tax + exposed) / M): summed over k,
    W exp(-(exposed - tax) / M) / (exp(S / M) - 1). The work done in a life is M (1 - exp(-W / M)) / (1 - exp(-S / M)),
    and a life with its restarts takes M exp(restart / M) (Daly). With exposed = tax this is Daly's cost function.

    Raises:
        ValueError: an interval that is not longer than the tax.
    """
    _check("estimate", interval=interval)
    work = interval - job.tax
    if work <= 0:
        raise ValueError(f"estimate(interval={interval:g}): that is not longer than the tax of {job.tax:g} s")
    up = math.exp(-job.restart / job.mtbf)
    done = up * math.expm1(-work / job.mtbf) / math.expm1(-interval / job.mtbf)
    saved, safe = _saved(work / job.mtbf), math.exp(-job.at_risk / job.mtbf)
    return Estimate(
        interval=interval,
        goodput=done * saved * safe,
        restarting=1 - up,
        taxed=up - done,
        repeated=done * (1 - saved),
        exposed=done * saved * (1 - safe),
    )


def _saved(x: float) -> float:
    """x / (exp(x) - 1): the share of work that saves every x mean lives keep, were they safe at once."""
    return x / math.expm1(x) if x < 700 else 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """The interval between saves that gives the most, and what holds it there: a name of `Job.floors`."""

    job: Job
    interval: float
    limit: str
    estimate: Estimate

    @property
    def costliest(self) -> str:
        """The largest loss: a field of `Estimate`."""
        return max(("restarting", "taxed", "repeated", "exposed"), key=lambda name: float(getattr(self.estimate, name)))


def plan(job: Job) -> Plan:
    """The best interval for `job`: the one that failures ask for, or the shortest that is possible.

    Goodput has one maximum over the interval, so that above it the shortest interval allowed is the best one.
    """
    floors = job.floors()
    limit = max(floors, key=floors.__getitem__)
    interval = floors[limit]
    if job.step:
        interval = job.step * math.ceil(interval / job.step * (1 - 1e-9))
    return Plan(job, interval, limit, estimate(job, interval))


def _check(what: str, zero: tuple[str, ...] = (), **numbers: float) -> None:
    """Finite and positive, or zero where `zero` names it."""
    for name, value in numbers.items():
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value < 0 or (value == 0 and name not in zero):
            least = "0 or a positive" if name in zero else "a positive"
            raise ValueError(f"{what}({name}={value!r}): give {least} number")
