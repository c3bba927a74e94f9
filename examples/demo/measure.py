"""What saving costs: blocks of steps with and without it in turn, in one process.

python -m demo.measure --run DIR --log FILE     leaves a Measurement in FILE
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from train_gpt import build, parse, train_step

import asyncckpt

ORDER = "ABBAABBA"
"""A: without, B: with a save after every step. A drift of the machine favours neither."""
TRIALS = 12
"""At most so many saves beforehand, for `overlap="auto"` to find its way."""


@dataclass(frozen=True)
class Moment:
    """One step, in seconds of `time.time()`; `save` was called at `computed` and returned at `end`."""

    begin: float
    computed: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.begin


@dataclass
class Measurement:
    without: list[Moment] = field(default_factory=list)
    saving: list[Moment] = field(default_factory=list)
    walls_without: list[float] = field(default_factory=list)
    walls_saving: list[float] = field(default_factory=list)
    """Seconds of every block, the wait for its last commit included."""
    saves: list[dict[str, Any]] = field(default_factory=list)
    """One for each moment of `saving`: step, blocked, and the fields of the timeline."""
    block: int = 0
    """Steps in a block."""
    overlap: bool | None = None

    @property
    def dearer(self) -> list[float]:
        """What a block with saving took more than its neighbour without, as a share, one for each pair."""
        return [b / a - 1 for a, b in zip(self.walls_without, self.walls_saving, strict=True)]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> Measurement:
        measured = cls(**json.loads(path.read_text()))
        measured.without = [Moment(**moment) for moment in measured.without]  # type: ignore[arg-type]
        measured.saving = [Moment(**moment) for moment in measured.saving]  # type: ignore[arg-type]
        return measured


def measure(size: str, seed: int, run: Path, block: int) -> Measurement:
    model, optimizer, scheduler, loader = build(size, 1000, seed)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}
    found = Measurement(block=block)
    step = 0

    with asyncckpt.Checkpointer(run, keep=asyncckpt.Keep(last=3)) as ckpt:

        def one(saving: bool) -> tuple[Moment, asyncckpt.SaveHandle | None]:
            nonlocal step
            step += 1
            begin = time.time()
            train_step(model, optimizer, scheduler, loader)
            computed = time.time()
            handle = ckpt.save(step, state) if saving else None
            return Moment(begin, computed, time.time()), handle

        for _ in range(3):
            one(False)
        for _ in range(TRIALS):
            if ckpt.stats().overlap is None:
                one(True)
        ckpt.wait_until_flushed()

        for kind in ORDER:
            begun = time.time()
            moments, handles = zip(*(one(kind == "B") for _ in range(block)), strict=True)
            ckpt.wait_until_flushed()
            wall = time.time() - begun
            if kind == "A":
                found.without += moments
                found.walls_without.append(wall)
            else:
                found.saving += moments
                found.walls_saving.append(wall)
                found.saves += [{"save": h.step, "blocked": h.blocked, **asdict(h.timeline)} for h in handles]
        found.overlap = ckpt.stats().overlap
    return found


def spread(seconds: list[float]) -> tuple[float, float, float]:
    """The median, and the bounds between which the middle 80 % lie."""
    if len(seconds) < 2:
        return seconds[0], seconds[0], seconds[0]
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    return statistics.median(seconds), tenths[0], tenths[-1]


if __name__ == "__main__":
    args = parse(sys.argv[1:])
    torch.set_num_threads(args.threads)
    measure(args.size, args.seed, args.run, block=max(3, args.steps // 4)).save(args.log)
