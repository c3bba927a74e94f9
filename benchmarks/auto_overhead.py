"""What `Auto(max_overhead=)` costs a training in truth: `python -m benchmarks.auto_overhead`.

A training saves as `Auto` says, and each step is timed. A save costs what its steps, from the one that it was made in
to the first that ended after its commit, took longer than the steps on both sides of it; `Auto`'s own figures have no
part in that. The overhead is the sum of these over the time that the training took.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import child, machine
from benchmarks.child import Record
from benchmarks.spread import spread

_RESULTS = Path(__file__).resolve().parent / "results" / "auto-overhead.jsonl"
_LEARNING = 2
"""Saves that `Auto` makes early, to measure them."""


def measure(
    tell: Callable[..., None], shape: dict[str, Any], directory: str, max_overhead: float, seconds: float
) -> None:
    """Runs in a child: tells the end of each step, and when each save was called and committed."""
    import asyncckpt
    from benchmarks.model import Shape, Training

    training = Training(Shape(**shape))
    training.step_seconds(5)
    state = {"model": training.model, "optimizer": training.optimizer}
    cadence, keep = asyncckpt.Auto(max_overhead=max_overhead), asyncckpt.Keep(last=2)
    ends: list[float] = []
    handles: list[tuple[int, asyncckpt.SaveHandle]] = []
    with asyncckpt.Checkpointer(directory, cadence=cadence, keep=keep) as ckpt:
        ckpt.prepare(state)
        begun = time.time()
        while time.time() - begun < seconds:
            training.step()
            handle = ckpt.maybe_save(len(ends), state)
            if handle is not None:
                handles.append((len(ends), handle))
            ends.append(time.time())
        stats = ckpt.stats()
    saves = [
        {"step": step, "blocked": handle.blocked, "committed": handle.timeline.commit_end}
        for step, handle in handles
        if handle.timeline is not None
    ]
    chosen = None if stats.interval is None else stats.interval.seconds
    tell(begun=begun, ends=ends, saves=saves, interval=chosen, tax=stats.save_tax, bytes=training.size())


def costs(record: Record) -> list[float]:
    """What each save cost, in seconds. One at the very end of the record is left out."""
    ends = [record["begun"], *record["ends"]]
    steps = [after - before for before, after in itertools.pairwise(ends)]
    spans = [(save["step"], _first_after(record["ends"], save["committed"])) for save in record["saves"]]
    spans = [(first, last) for first, last in spans if last < len(steps) - 1]
    touched = {at for first, last in spans for at in range(first, last + 1)}
    bounds = [0, *((a[1] + b[0]) // 2 for a, b in itertools.pairwise(spans)), len(steps)]
    found = []
    for (first, last), begin, end in zip(spans, bounds, bounds[1:], strict=False):
        quiet = statistics.fmean(steps[at] for at in range(begin, end) if at not in touched)
        found.append(sum(steps[first : last + 1]) - (last + 1 - first) * quiet)
    return found


def _first_after(ends: list[float], instant: float) -> int:
    return next((at for at, end in enumerate(ends) if end >= instant), len(ends))


def report(record: Record, max_overhead: float) -> str:
    begun, ends, saves = record["begun"], record["ends"], record["saves"]
    found = costs(record)
    steady = found[_LEARNING:]
    wall = ends[-1] - begun
    lines = [f"{len(ends)} steps in {wall:.0f} s, state {record['bytes'] / 1e6:.0f} MB, {len(saves)} saves"]
    if len(steady) < 3 or record["interval"] is None:
        return "\n".join([*lines, "too few saves to say more: give --seconds"])
    called = [ends[save["step"]] for save in saves[_LEARNING:]]
    apart = statistics.fmean(later - earlier for earlier, later in itertools.pairwise(called))
    cost = spread(steady)
    assert cost is not None
    mean, (low, high) = statistics.fmean(steady), _interval_of_mean(steady)
    lines += [
        f"Auto: a save costs {record['tax'] * 1e3:.0f} ms, one every {record['interval']:.2f} s",
        f"truth: a save costs {mean * 1e3:.0f} ms [{low * 1e3:.0f}, {high * 1e3:.0f}] (median {cost.median * 1e3:.0f}),"
        f" one every {apart:.2f} s: {mean / apart:.2%} [{low / apart:.2%}, {high / apart:.2%}] of the time,"
        f" allowed {max_overhead:.1%}",
        f"with the saves made to learn: {sum(found) / wall:.2%}",
    ]
    return "\n".join(lines)


def _interval_of_mean(values: list[float]) -> tuple[float, float]:
    """95 %, by bootstrap."""
    import numpy as np

    drawn = np.random.default_rng(0).choice(values, (2000, len(values))).mean(axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.auto_overhead", description=__doc__)
    parser.add_argument("--size", default="25m", help="of the model")
    parser.add_argument("--sequence", type=int, default=192, help="tokens of a step")
    parser.add_argument("--threads", type=int, default=2, help="of the training")
    parser.add_argument("--max-overhead", type=float, default=0.01)
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument("--quick", action="store_true", help="a tiny model, 8 s; nothing is written to results/")
    parser.add_argument("--directory", type=Path, default=Path(), help="where to checkpoint to (a temporary one here)")
    arguments = parser.parse_args()
    size, sequence = ("4m", 16) if arguments.quick else (arguments.size, arguments.sequence)
    seconds = 8.0 if arguments.quick else arguments.seconds
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=arguments.directory) as folder:
        shape = {"size": size, "sequence": sequence, "threads": arguments.threads}
        run = {"shape": shape, "max_overhead": arguments.max_overhead, "seconds": seconds}
        (record,) = child.run("auto_overhead", seconds + 120, directory=str(Path(folder).resolve()), **run)
        record = {**run, "machine": machine.describe(Path(folder)), **record}
    if not arguments.quick:
        _RESULTS.parent.mkdir(exist_ok=True)
        _RESULTS.write_text(json.dumps(record) + "\n")
    print(", ".join(f"{name} {value}" for name, value in record["machine"].items()), file=sys.stderr)
    print(report(record, arguments.max_overhead))


if __name__ == "__main__":
    main()
