"""The long form: `python -m hostile.fuzz --minutes 10`, in the folder `tests`.

Where atheris is installed, it is guided by what the cases reach: see `guided`. Else cases are random, and each is its
seed. They run in a child process with a cap on its address space, and each has its time, so that what crashes, hangs or
takes memory is seen, and the seed of it known.
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import importlib.util
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from hostile.attacks import ATTACKS
from hostile.forge import Forgery, clear, commit
from hostile.judge import judge
from hostile.mutate import mutate

BATCH = 500
CASE_SECONDS = 20
BATCH_SECONDS = 600
MEMORY = 256 << 20
ROOM = 2 << 30
"""Address space that a child may take beyond what it has when its first case begins."""


class Found(Exception):
    """A case that broke a promise."""


def batch(seeds: range, attacks: bool = False) -> dict[str, Any]:
    """Run these cases in a child: how many, how they ended, the growth of its memory in bytes, the slowest in seconds.

    Raises:
        Found: a promise was broken, or the child died.
    """
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        command = [sys.executable, "-m", "hostile.fuzz", "--child", folder, str(seeds.start), str(seeds.stop)]
        tests = Path(__file__).parent.parent
        try:
            done = subprocess.run(
                command + ["--attacks"] * attacks, cwd=tests, capture_output=True, text=True, timeout=BATCH_SECONDS
            )
        except subprocess.TimeoutExpired:
            raise Found(f"case {_current(folder)}: the batch took more than {BATCH_SECONDS} seconds") from None
        if done.returncode:
            raise Found(f"case {_current(folder)}: exit status {done.returncode}\n{done.stderr[-6000:]}")
    report: dict[str, Any] = json.loads(done.stdout)
    if report["growth"] > MEMORY:
        raise Found(f"cases {seeds}: memory grew by {report['growth'] >> 20} MB")
    return report


def _current(folder: str) -> str:
    path = Path(folder, "current")
    return path.read_text() if path.exists() else "none"


def _child(folder: Path, seeds: range, attacks: bool) -> None:
    commit(folder / "original")
    judge(folder / "original", watched=False)
    original = Forgery.of(folder / "original")
    virtual, resident = _memory()
    resource.setrlimit(resource.RLIMIT_AS, (virtual + ROOM, virtual + ROOM))
    ends: Counter[str] = Counter()
    slowest = 0.0
    for case in [*(ATTACKS if attacks else ()), *seeds]:
        (folder / "current").write_text(str(case))
        work = folder / "case"
        clear(work)
        (work / "run").mkdir()
        forgery = copy.deepcopy(original)
        if isinstance(case, str):
            ATTACKS[case](forgery)
        else:
            mutate(forgery, random.Random(case))
        forgery.write(work / "run")
        faulthandler.dump_traceback_later(CASE_SECONDS, exit=True)
        begin = time.monotonic()
        ends.update(judge(work / "run"))
        slowest = max(slowest, time.monotonic() - begin)
        faulthandler.cancel_dump_traceback_later()
    peak = _peak()
    cases = len(seeds) + (len(ATTACKS) if attacks else 0)
    print(json.dumps({"cases": cases, "ends": ends, "growth": peak - resident, "slowest": slowest}))


def _memory() -> tuple[int, int]:
    """Bytes of address space, and of it in memory."""
    virtual, resident = Path("/proc/self/statm").read_text().split()[:2]
    return int(virtual) * resource.getpagesize(), int(resident) * resource.getpagesize()


def _peak() -> int:
    """The most bytes in memory since this program began; `ru_maxrss` would count what its parent had before that."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) << 10


def _long(minutes: float, seed: int) -> None:
    print(f"{minutes:g} minutes of changed and sealed checkpoints, from seed {seed}", flush=True)
    end = time.monotonic() + 60 * minutes
    cases, growth, slowest, ends = 0, 0, 0.0, Counter[str]()
    while time.monotonic() < end:
        report = batch(range(seed + cases, seed + cases + BATCH), attacks=cases == 0)
        cases += BATCH
        ends.update(report["ends"])
        growth, slowest = max(growth, report["growth"]), max(slowest, report["slowest"])
        print(
            f"{cases} cases, {max(0.0, end - time.monotonic()):.0f} s left; memory grew by at most {growth >> 20} MB, "
            f"slowest case {slowest:.2f} s; {', '.join(f'{n} {how}' for how, n in ends.most_common())}",
            flush=True,
        )


def _guided(minutes: float) -> None:
    """Raises `Found` where a case broke a promise; it is then kept as a file."""
    place = Path(__file__).parents[2] / "runs" / "fuzz"
    print(f"{minutes:g} minutes of changed and sealed checkpoints, guided by atheris; in {place}", flush=True)
    place.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "hostile.guided", str(place), str(round(60 * minutes))]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent)
    if done.returncode:
        raise Found(f"exit status {done.returncode}: `python -m hostile.guided FILE` does the case in FILE again")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=None, help="random cases from this seed on")
    parser.add_argument("--random", action="store_true", help="random cases, though atheris is there")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--attacks", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        folder, start, stop = args.child
        _child(Path(folder), range(int(start), int(stop)), args.attacks)
        return None
    if importlib.util.find_spec("atheris") is not None and args.seed is None and not args.random:
        return _guided(args.minutes)
    if not args.random:
        print("atheris is not installed (the extra `fuzz`), or a seed was given: the cases are random")
    _long(args.minutes, random.randrange(1 << 40) if args.seed is None else args.seed)
    return None


if __name__ == "__main__":
    try:
        main()
    except Found as found:
        sys.exit(str(found))
