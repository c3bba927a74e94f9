"""What a checkpoint costs a training, library by library: `python -m benchmarks.overlap`. See benchmarks/README.md."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from benchmarks import child, durability, machine, peers, report, summary
from benchmarks.child import Child, ChildError, Record
from benchmarks.memory import Sampler
from benchmarks.model import DTYPES, SIZES, Shape

RESULTS = Path(__file__).resolve().parent / "results"
FULL = [[0, 8], [1, 8], [1, 8], [0, 8], [4, 16], [0, 8], [16, 32], [0, 8]]
QUICK = [[0, 4], [1, 4], [1, 4], [0, 4], [4, 8], [0, 4], [16, 16], [0, 4]]
"""Windows of a round, as [a save every, steps]: quiet and saving ones in turn, A B B A."""
_TINY = Shape("4m")


class Run:
    """Measures peer after peer, and writes every record as it comes."""

    def __init__(self, arguments: argparse.Namespace, directory: Path, out: TextIO) -> None:
        self.arguments, self.directory, self.out = arguments, directory, out
        self.shape = Shape(arguments.size, arguments.device, arguments.dtype, arguments.threads)
        self.size = 0
        self.records: list[Record] = []
        self._begun = time.monotonic()

    def __call__(self) -> None:
        self._calibrate()
        names: list[str] = self.arguments.peers
        for number in range(self.arguments.rounds):
            self._floors(number)
            for name in names if number % 2 == 0 else reversed(names):
                self._say(f"round {number + 1}/{self.arguments.rounds}: {name}")
                self._peer(name, number)
        self._floors(self.arguments.rounds)

    def _peer(self, name: str, number: int) -> None:
        self._attempt(name, number, "timing", self._timing)
        if name != "none" and number < 2:
            self._attempt(name, number, "kill", self._kill)
        if name != "none" and number == 0:
            self._attempt(name, number, "fsync", self._fsync)

    def _attempt(self, name: str, number: int, role: str, measure: Any) -> None:
        """A peer that fails is a record too, and so is one that takes too long."""
        folder = Path(tempfile.mkdtemp(dir=self.directory))
        try:
            measure(name, number, folder)
        except ChildError as error:
            self._say(f"  {role} failed: {error}")
            self._put(kind="error", peer=name, round=number, role=role, text=str(error))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _timing(self, name: str, number: int, folder: Path) -> None:
        schedule = QUICK if self.arguments.quick else FULL
        schedule = [window for window in schedule if window[0] in (0, *self.arguments.every)]
        options = {"peer": name, "shape": self.shape.to_json(), "directory": str(folder), "schedule": schedule}
        with Child("timing", self.arguments.limit, **options) as process:
            sampler = Sampler(process.process.pid)
            try:
                for record in process.records():
                    if "phase" in record:
                        sampler.phase(record["phase"])
                    else:
                        self._put(peer=name, round=number, **record)
            finally:
                sampler.close()
        if {"with", "without"} <= sampler.peaks.keys():
            self._put(kind="memory", peer=name, round=number, **sampler.peaks)

    def _kill(self, name: str, number: int, folder: Path) -> None:
        shape = self.shape.to_json()
        found = durability.survives_kill(name, shape, folder, 2 if self.arguments.quick else 3, self.arguments.limit)
        self._put(peer=name, round=number, **{**found, "kind": "kill"})

    def _fsync(self, name: str, number: int, folder: Path) -> None:
        """Which files are fsynced does not depend on their size."""
        shape = replace(_TINY, device=self.shape.device, threads=self.shape.threads)
        found = durability.fsynced(name, shape.to_json(), folder, self.arguments.limit)
        self._put(kind="fsync", peer=name, round=number, **found)

    def _calibrate(self) -> None:
        self._say(f"calibrating the step of {self.shape.size} on {self.shape.device}")
        found = child.run("calibrate", 300, shape=self.shape.to_json(), factor=self.arguments.factor)[-1]
        self.size = found["size"]
        self.shape = replace(self.shape, batch=found["batch"], sequence=found["sequence"])
        self._put(
            kind="run",
            shape=self.shape.to_json(),
            copy=found["copy"],
            step=found["step"],
            rounds=self.arguments.rounds,
            peers=self.arguments.peers,
            quick=self.arguments.quick,
            torch=importlib.metadata.version("torch"),
            versions=_versions(),
            machine=machine.describe(self.directory) | _device(self.shape.device),
            when=time.strftime("%Y-%m-%d"),
        )
        times = found["step"] / found["copy"]
        self._say(
            f"{self.size / 1e9:.3f} GB of state; one copy {found['copy']:.4f} s; "
            f"batch {found['batch']} x {found['sequence']} tokens: step {found['step']:.3f} s, {times:.1f}x the copy"
        )

    def _floors(self, number: int) -> None:
        self._say("measuring the machine")
        repeats = 3 if self.arguments.quick else 5
        cuda = self.shape.device == "cuda"
        options = {"directory": str(self.directory), "size": self.size, "repeats": repeats, "cuda": cuda}
        self._put(round=number, **child.run("machine", 600, **options)[-1])

    def _put(self, **record: Any) -> None:
        self.records.append(record)
        self.out.write(json.dumps(record) + "\n")
        self.out.flush()

    def _say(self, text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self._begun), 60)
        print(f"[{minutes:3}:{seconds:02}] {text}", file=sys.stderr, flush=True)


def _versions() -> dict[str, str]:
    names = ["asyncckpt", "torchsnapshot", "torch_checkpointing", "lightning", "orbax-checkpoint"]
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _device(device: str) -> dict[str, str]:
    if device != "cuda":
        return {}
    import torch

    return {"gpu": torch.cuda.get_device_name()}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.overlap", description=__doc__)
    parser.add_argument("--size", choices=SIZES, help="of the model (100m; with --quick 4m)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--threads", type=int, default=2, help="of the training")
    parser.add_argument("--factor", type=float, default=8.0, help="a step takes so many copies of the state (8)")
    parser.add_argument("--rounds", type=int, help="each peer is measured so often (2; with --quick 1)")
    parser.add_argument("--every", type=int, nargs="+", default=[1, 4, 16], choices=[1, 4, 16], help="steps per save")
    parser.add_argument("--peers", nargs="+", default=peers.NAMES, choices=peers.NAMES, metavar="PEER")
    parser.add_argument("--quick", action="store_true", help="a small model and few steps: shows that all runs")
    parser.add_argument("--limit", type=float, help="seconds that one process may take (1200; with --quick 300)")
    parser.add_argument("--directory", type=Path, default=Path(), help="where to checkpoint to (a temporary one here)")
    parser.add_argument("--name", help="of the results (overlap-DEVICE; with --quick quick)")
    parser.add_argument("--timeline", default="asyncckpt", choices=peers.NAMES, metavar="PEER")
    parser.add_argument("--show", action="store_true", help="measure nothing; show the results of that name")
    marks = "print the tables so, or put the brief one between FILE's marks"
    parser.add_argument("--markdown", nargs="?", const="-", metavar="FILE", help=marks)
    arguments = parser.parse_args()
    quick = arguments.quick
    arguments.size = arguments.size or ("4m" if quick else "100m")
    arguments.rounds = arguments.rounds or (1 if quick else 2)
    arguments.limit = arguments.limit or (300.0 if quick else 1200.0)
    arguments.name = arguments.name or ("quick" if quick else f"overlap-{arguments.device}")
    return arguments


def _measure(arguments: argparse.Namespace, path: Path) -> None:
    """The results of an earlier run stay until this one is whole."""
    directory = Path(tempfile.mkdtemp(prefix=".bench-", dir=arguments.directory)).resolve()
    unfinished = path.with_suffix(".unfinished.jsonl")
    try:
        with unfinished.open("w") as out:
            Run(arguments, directory, out)()
        unfinished.replace(path)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def main() -> None:
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{arguments.name}.jsonl"
    if not arguments.show:
        _measure(arguments, path)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    result = summary.summarise(records)
    try:
        from benchmarks import pictures
    except ImportError as error:
        print(f"no pictures: {error}", file=sys.stderr)
    else:
        pictures.tax(result, RESULTS / f"{arguments.name}-tax.png")
        pictures.timeline(records, arguments.timeline, RESULTS / f"{arguments.name}-timeline.png")
    if arguments.markdown == "-":
        print(report.markdown(result))
    else:
        console = Console()
        report.show(result, console if console.is_terminal else Console(width=220))
        if arguments.markdown:
            report.put_into(Path(arguments.markdown), report.brief(result))


if __name__ == "__main__":
    main()
