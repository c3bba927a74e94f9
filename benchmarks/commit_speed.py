"""How near to the disk's own speed asyncckpt saves and restores: `python -m benchmarks.commit_speed`.

Every save or restore is made in turn (A B B A) with the plain operation that it is held against, of the same size, in
one process. Memory is read over many small saves in another one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import child
from benchmarks.child import Child, ChildError, Record
from benchmarks.memory import Sampler
from benchmarks.spread import slope, spread

_RESULTS = Path(__file__).resolve().parent / "results" / "commit-speed.jsonl"
_SPARE = 64 << 20
_COMPARISONS = [
    ("idle", "save", "fresh", "committed, idle trainer", "O_DIRECT write, fresh blocks", "90 %"),
    ("idle", "write", "fresh", "its writing alone", "O_DIRECT write, fresh blocks", ""),
    ("idle", "over", "fresh", "O_DIRECT write over its own blocks", "O_DIRECT write, fresh blocks", ""),
    ("busy", "save", "fresh idle", "committed, beside training", "O_DIRECT write, idle", "60 %"),
    ("busy", "save", "fresh", "committed, beside training", "O_DIRECT write, beside training", ""),
    ("restore", "cold", "direct read", "restore, cold", "O_DIRECT read", "90 %"),
    ("restore", "warm", "memcpy", "restore, warm", "memcpy, one thread", "50 %"),
]
"""Which samples are held against which, and what share of the plain speed is the goal."""


def _table(records: list[Record]) -> Table:
    table = Table("asyncckpt", "time", "rate", "against", "time", "share of its speed", "goal", "reached")
    sized = [record for record in records if "size" in record]
    table.title = (
        f"Against the plain operation, {sized[0]['size'] / 1e9:.3f} GB (median, 95 % interval)" if sized else ""
    )
    samples: dict[tuple[str, str], list[float]] = {}
    for record in records:
        if record["kind"] == "sample":
            samples.setdefault((record["group"], record["what"]), []).append(record["seconds"])
    samples["busy", "fresh idle"] = samples.get(("idle", "fresh"), [])
    for group, what, against, name, limit, goal in _COMPARISONS:
        ours, plain = samples.get((group, what), []), samples.get((group, against), [])
        middle, floor = spread(ours), spread(plain)
        if middle is None or floor is None:
            table.add_row(name, "not measured")
            continue
        share = spread([floor.median / seconds for seconds in ours])
        assert share is not None
        reached = ("yes" if share.low >= float(goal.split()[0]) / 100 else "no") if goal else ""
        table.add_row(
            name,
            f"{middle.median:.3f} s",
            f"{sized[0]['size'] / middle.median / 1e9:.2f} GB/s",
            limit,
            f"{floor.median:.3f} s",
            f"{share.median:.0%} [{share.low:.0%}, {share.high:.0%}]",
            goal,
            reached,
        )
    return table


def _memory_text(records: list[Record]) -> str:
    readings = [record["bytes"] for record in records if record["kind"] == "reading"]
    peaks = next((record for record in records if record["kind"] == "peaks"), None)
    if peaks is None or len(readings) < 8:
        return "Memory: not measured."
    extra = peaks["with"] - peaks["without"]
    most = peaks["in_flight"] * peaks["state"] + _SPARE
    settled = readings[len(readings) // 10 :]
    rate, low, high = (growth / peaks["apart"] for growth in slope(settled))
    verdict = "0 is in it" if low <= 0 <= high else "0 is NOT in it"
    return (
        f"Memory over {peaks['saves']} saves of {peaks['state'] / 1e6:.0f} MB: at most {extra / 1e6:.0f} MB beside the "
        f"training (goal {most / 1e6:.0f} MB: {'reached' if extra <= most else 'NOT reached'}); "
        f"slope {rate:.0f} bytes per save, 95 % interval [{low:.0f}, {high:.0f}]: {verdict}."
    )


class _Run:
    def __init__(self, arguments: argparse.Namespace, directory: Path) -> None:
        self.arguments, self.directory = arguments, directory
        self.records: list[Record] = []

    def __call__(self) -> None:
        self._attempt("speed", self._speed)
        self._attempt("memory", self._memory)

    def _attempt(self, what: str, measure: Any) -> None:
        folder = Path(tempfile.mkdtemp(dir=self.directory))
        try:
            measure(folder)
        except ChildError as error:
            print(f"{what} failed: {error}", file=sys.stderr)
            self.records.append({"kind": "error", "what": what, "text": str(error)})
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _speed(self, folder: Path) -> None:
        print(f"speed of {self.arguments.size}, {self.arguments.rounds} rounds", file=sys.stderr, flush=True)
        shape = {"size": self.arguments.size, "threads": self.arguments.threads, "sequence": self.arguments.sequence}
        options = {"shape": shape, "directory": str(folder), "rounds": self.arguments.rounds}
        child.run("commit_speed", self.arguments.limit, self.records.append, **options)

    def _memory(self, folder: Path) -> None:
        print(f"memory over {self.arguments.saves} saves", file=sys.stderr, flush=True)
        options = {"directory": str(folder), "saves": self.arguments.saves}
        with Child("endurance", self.arguments.limit, **options) as process:
            sampler = Sampler(process.process.pid)
            last: Record = {}
            try:
                for record in process.records():
                    if "phase" in record:
                        sampler.phase(record["phase"])
                    elif record["kind"] == "reading":
                        self.records.append(record)
                    else:
                        last = record
            finally:
                sampler.close()
        self.records.append({**last, **sampler.peaks, "kind": "peaks"})


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.commit_speed", description=__doc__)
    parser.add_argument("--size", help="of the model (100m; with --quick 4m)")
    parser.add_argument("--rounds", type=int, help="of A B B A (6; with --quick 2)")
    parser.add_argument("--saves", type=int, help="that memory is read over (500; with --quick 40)")
    parser.add_argument("--threads", type=int, default=2, help="of the training")
    parser.add_argument("--sequence", type=int, default=64, help="tokens of a training step")
    parser.add_argument("--limit", type=float, default=1200.0, help="seconds that each half may take")
    parser.add_argument("--quick", action="store_true", help="a small state and few rounds")
    parser.add_argument("--directory", type=Path, default=Path(), help="where to checkpoint to (a temporary one here)")
    arguments = parser.parse_args()
    quick = arguments.quick
    arguments.size = arguments.size or ("4m" if quick else "100m")
    arguments.rounds = arguments.rounds or (2 if quick else 6)
    arguments.saves = arguments.saves or (40 if quick else 500)
    directory = Path(tempfile.mkdtemp(prefix=".bench-", dir=arguments.directory)).resolve()
    run = _Run(arguments, directory)
    try:
        run()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    if not quick:
        _RESULTS.parent.mkdir(exist_ok=True)
        _RESULTS.write_text("".join(json.dumps(record) + "\n" for record in run.records))
    console = Console()
    console = console if console.is_terminal else Console(width=180)
    console.print(_table(run.records))
    console.print(_memory_text(run.records), markup=False)


if __name__ == "__main__":
    main()
