"""What becomes of a training that is killed again and again: `python -m benchmarks.goodput`.

A supervisor kills a training, and all that it started, at instants drawn once from an exponential distribution, the
same for each arm; the next life resumes from what is whole. What was useful is held against what the planner predicts
from a pilot without failures.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from asyncckpt.policy.plan import Estimate, Job, estimate, plan
from asyncckpt.policy.simulate import Played, exponential, simulate
from benchmarks import machine
from benchmarks.child import Child, Record
from benchmarks.spread import Spread, spread
from benchmarks.supervisor import ARMS, Setting, measure_costs, nursery, play

_RESULTS = Path(__file__).resolve().parent / "results" / "goodput.jsonl"


@dataclass
class Costs:
    """What the pilot found of a peer, in seconds: the planner's input."""

    step: float
    tax: float
    commit: float
    restart: float

    def job(self, mtbf: float) -> Job:
        """A save is safe once it is whole: the supervisor kills writer processes too."""
        return Job(mtbf=mtbf, tax=self.tax, write=self.commit, restart=self.restart, step=self.step)


def costs_of(record: Record) -> Costs:
    told = record["told"]
    windows = [r for r in told if r["what"] == "window"]
    step = statistics.fmean(r["seconds"] / r["steps"] for r in windows if not r["saving"])
    called = {r["step"]: r["at"] for r in told if r["what"] == "called"}
    commits = [r["at"] - called[r["step"]] for r in told if r["what"] == "saved"]
    taxes = []
    for before, here, after in zip(windows, windows[1:], windows[2:], strict=False):
        if here["saving"]:
            quiet = [r["seconds"] / r["steps"] for r in (before, after) if not r["saving"]]
            taxes.append((here["seconds"] - here["steps"] * statistics.fmean(quiet)) / here["saves"])
    commit = statistics.median(commits)
    return Costs(step, max(statistics.median(taxes), 1e-4), commit, statistics.median(record["restarts"]))


@dataclass(frozen=True)
class Outcome:
    """An arm over all of its rounds: measured, predicted by the planner, and played on the very same failures.

    `kept` is useful steps over all steps made, `goodput` useful steps times a step's seconds over the wall time.
    """

    arm: str
    every: int
    interval: float
    kills: int
    wall: float
    useful: int
    steps: int
    saves: int
    goodput: float
    rounds: list[float]
    chosen: Spread | None
    predicted: Estimate
    played: Played

    @property
    def kept(self) -> float:
        return self.useful / self.steps


def outcomes(records: list[Record]) -> list[Outcome]:
    setting = Setting(**next(r["setting"] for r in records if r["kind"] == "setting"))
    costs = {r["peer"]: costs_of(r) for r in records if r["kind"] == "pilot"}
    step = statistics.fmean(c.step for c in costs.values())
    found = []
    for name, arm in ARMS.items():
        rounds = [r for r in records if r["kind"] == "round" and r["arm"] == name]
        if not rounds:
            continue
        job = costs[arm["peer"]].job(setting.mtbf)
        every, interval = interval_of(job, arm["fixed"])
        lives = [life for r in rounds for life in r["lives"]]
        wall, useful = sum(r["wall"] for r in rounds), sum(r["useful"] for r in rounds)
        games = [simulate(job, interval, exponential(setting.mtbf, r["seed"]), count=len(r["lives"])) for r in rounds]
        played = Played(*(sum(getattr(game, field) for game in games) for field in asdict(games[0])))
        found.append(
            Outcome(
                arm=name,
                every=every,
                interval=interval,
                kills=len(lives),
                wall=wall,
                useful=useful,
                steps=sum(life["steps"] for life in lives),
                saves=sum(life["saves"] for life in lives),
                goodput=useful * step / wall,
                rounds=[r["useful"] / max(1, sum(life["steps"] for life in r["lives"])) for r in rounds],
                chosen=spread([seconds for life in lives for seconds in life["intervals"][-1:]]),
                predicted=estimate(job, interval),
                played=played,
            )
        )
    return found


def interval_of(job: Job, fixed: bool) -> tuple[int, float]:
    """The planner's best interval: in steps (0 for `Auto`, which is to find it) and in seconds."""
    best = plan(replace(job, step=0.0)).interval
    every = max(1, round((best - job.tax) / job.step))
    return (every, every * job.step + job.tax) if fixed else (0, best)


def tables(records: list[Record]) -> list[Table]:
    pilots = Table("peer", "step", "save tax", "to whole", "restart", title="The pilot, without failures")
    for record in records:
        if record["kind"] == "pilot":
            c = costs_of(record)
            pilots.add_row(record["peer"], *(f"{1e3 * seconds:.1f} ms" for seconds in asdict(c).values()))
    head = ["arm", "interval", "kills", "useful / made", "kept", "rounds", "planner", "same failures", "goodput"]
    table = Table(*head, "planner", "same failures", title="Kept: useful steps over all. Goodput: of the wall time")
    for o in outcomes(records):
        chosen = (
            f"{o.chosen.median:.2f} s (planner {o.interval:.2f})" if o.chosen else f"{o.every} ({o.interval:.2f} s)"
        )
        table.add_row(
            o.arm,
            chosen,
            str(o.kills),
            f"{o.useful} / {o.steps}",
            f"{o.kept:.1%}",
            f"{min(o.rounds):.0%}-{max(o.rounds):.0%}",
            f"{o.predicted.kept:.1%}",
            f"{o.played.kept:.1%}",
            f"{o.goodput:.1%}",
            f"{o.predicted.goodput:.1%}",
            f"{o.played.goodput:.1%}",
        )
    return [pilots, table]


class _Comparison:
    def __init__(self, setting: Setting, results: Path | None, directory: Path, limit: float) -> None:
        self.setting, self._results, self._directory, self._limit = setting, results, directory, limit
        self.records: list[Record] = []
        if results is not None and results.exists():
            self.records = [json.loads(line) for line in results.read_text().splitlines()]

    def pilot(self) -> None:
        """Begins anew: what was found before is dropped."""
        self.records = [{"kind": "setting", "setting": asdict(self.setting), "machine": machine.describe(Path())}]
        for name in [name for name, arm in ARMS.items() if arm["fixed"]]:
            print(f"pilot: {name}", file=sys.stderr, flush=True)
            with self._child() as (child, folder):
                self._add(measure_costs(child, self.setting, name, folder))

    def round(self, number: int, arms: Sequence[str] = tuple(ARMS)) -> None:
        """Every arm once, or some, in one order in even rounds and in the reverse order in odd ones."""
        self.records = [r for r in self.records if r["kind"] != "round" or r["seed"] != number or r["arm"] not in arms]
        setting = Setting(**self.records[0]["setting"])
        costs = {r["peer"]: costs_of(r) for r in self.records if r["kind"] == "pilot"}
        for name in [name for name in ARMS if name in arms][:: -1 if number % 2 else 1]:
            print(f"round {number}: {name}", file=sys.stderr, flush=True)
            every, _ = interval_of(costs[ARMS[name]["peer"]].job(setting.mtbf), ARMS[name]["fixed"])
            with self._child() as (child, folder):
                self._add(play(child, setting, name, every, folder, number))

    def _add(self, record: Record) -> None:
        self.records.append(record)
        if self._results is not None:
            self._results.parent.mkdir(exist_ok=True)
            self._results.write_text("".join(json.dumps(record) + "\n" for record in self.records))

    @contextmanager
    def _child(self) -> Iterator[tuple[Child, Path]]:
        folder = Path(tempfile.mkdtemp(prefix=".bench-", dir=self._directory)).resolve()
        try:
            with nursery(self._limit) as child:
                yield child, folder / "run"
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.goodput", description=__doc__)
    parser.add_argument("parts", nargs="*", help="pilot, numbers of rounds, report; nothing for all")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="whose rounds are made anew")
    parser.add_argument("--mtbf", type=float, default=Setting.mtbf, help="seconds between failures")
    parser.add_argument("--kills", type=int, default=Setting.kills, help="in one round of one arm")
    parser.add_argument("--quick", action="store_true", help="one short round; nothing is written to results/")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds that one arm of a round may take")
    parser.add_argument("--directory", type=Path, default=Path(), help="where to checkpoint to (a temporary one here)")
    arguments = parser.parse_args()
    setting = Setting(mtbf=arguments.mtbf, kills=arguments.kills)
    if arguments.quick:
        setting = Setting(mtbf=1.5, kills=3, sequence=16, windows=4, restarts=1)
    results = None if arguments.quick else _RESULTS
    comparison = _Comparison(setting, results, arguments.directory, arguments.limit)
    parts = arguments.parts or ["pilot", *map(str, range(1 if arguments.quick else arguments.rounds))]
    for part in parts:
        if part == "pilot":
            comparison.pilot()
        elif part != "report":
            comparison.round(int(part), arguments.arms)
    console = Console()
    console = console if console.is_terminal else Console(width=180)
    for table in tables(comparison.records):
        console.print(table)


if __name__ == "__main__":
    main()
