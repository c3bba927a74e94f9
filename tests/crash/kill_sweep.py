"""SIGKILL at every storage operation of a scenario, and at operations of the recovery that follows.

A process of its own, without torch and with no thread but its first, so that it may fork for every trial:

    python -m crash.kill_sweep SCENARIO buffered|direct TRIALS SEED

kills at up to TRIALS points, drawn from all operations x {before, during, after}, and prints what it found as JSON.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import get_args

from asyncckpt.testing import CHANGES, FaultyPosix, ServiceDriver
from asyncckpt.testing.faults import ANY, When
from asyncckpt.testing.promises import Event
from crash.rig import RUN, behind, chunks_of, held_against, memory_folder, places
from crash.scenarios import SCENARIOS, Scenario, resume

WHENS: tuple[When, ...] = ("before", "during", "after")
_EVENTS = {kind.__name__: kind for kind in get_args(Event)}


@dataclass
class Figures:
    operations: int = 0
    kills: int = 0
    kills_of_recovery: int = 0
    violations: list[str] = field(default_factory=list)


def in_child(work: Callable[[Callable[[object], None]], None]) -> tuple[list[object], int]:
    """Fork; the child does `work` with a function that tells the parent something. Also its wait status."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(ours)
            work(lambda what: os.write(theirs, json.dumps(what).encode() + b"\n") and None)
            code = 0
        except BaseException:
            logging.exception("in the child")
        finally:
            os._exit(code)
    os.close(theirs)
    with open(ours, "rb") as pipe:
        told = [json.loads(line) for line in pipe]
    return told, os.waitpid(pid, 0)[1]


class Life:
    """A run below `base`, lived through by one process after another."""

    def __init__(self, base: Path, scenario: Scenario, direct: bool) -> None:
        self.base, self.scenario, self.direct = base, scenario, direct
        self.told = places(scenario)
        base.mkdir()

    def live(self, run: Callable[[Callable[[], ServiceDriver]], None], at: int = 0, when: When = "before") -> bool:
        """Let a process do `run`, and be killed at operation `at` (0: not at all). False where it came to its end."""
        told, status = in_child(lambda tell: self._child(run, at, when, tell))
        for name, members in told:  # type: ignore[misc]
            for promises in self.told.values():
                promises.tell(_EVENTS[name](**members))
        if status and not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL and at):
            raise RuntimeError(f"the process ended with status {status}")
        return status != 0

    def _child(self, run: Callable[..., None], at: int, when: When, tell: Callable[[object], None]) -> None:
        posix = FaultyPosix()
        if at:
            posix.kill(at, when)

        def note(event: Event) -> None:
            tell((type(event).__name__, asdict(event)))

        with chunks_of(self.scenario.chunk_size):
            root = str(self.base / RUN)
            run(lambda: self.scenario.driver(root, posix, self.direct, note))

    def check(self, *, done: bool = False) -> list[str]:
        """What is broken now; clears leftovers as a new owner does, on the mirror only when all is `done`: what is left
        there is gone on with."""

        def look(tell: Callable[[object], None]) -> None:
            found = held_against(self.base, self.told, mirror_swept=done)
            for why in found + (behind(self.base, self.told) if done else []):
                tell(why)

        return in_child(look)[0]  # type: ignore[return-value]


def operations(scenario: Scenario, base: Path, direct: bool) -> int:
    """How many operations it has that can be killed."""
    counts: list[int] = []

    def count(tell: Callable[[object], None]) -> None:
        posix = FaultyPosix()
        with chunks_of(scenario.chunk_size):
            scenario.run(lambda: scenario.driver(str(base / RUN), posix, direct, lambda event: None))
        tell(posix.counts[ANY])

    base.mkdir()
    counts = in_child(count)[0]  # type: ignore[assignment]
    shutil.rmtree(base)
    return counts[0]


def kill(life: Life, at: int, when: When, second: int, figures: Figures) -> None:
    """One trial: a kill, perhaps a kill of what recovers from it, then a recovery that may finish."""
    figures.kills += life.live(life.scenario.run, at, when)
    broken = [f"at once: {why}" for why in life.check()] if second % 2 else []
    if second:
        figures.kills_of_recovery += life.live(resume, second, when)
    broken += [f"after recovery was killed: {why}" for why in life.check()]
    life.live(resume)
    broken += [f"after recovery: {why}" for why in life.check(done=True)]
    figures.violations += [f"killed {when} operation {at}, recovery at {second}: {why}" for why in broken]


def sweep_kills(name: str, direct: bool, trials: int, seed: int) -> Figures:
    scenario, coin, figures = SCENARIOS[name], random.Random(seed), Figures()
    with memory_folder() as folder:
        figures.operations = operations(scenario, folder / "count", direct)
        points = [(at, when) for at in range(1, figures.operations + 1) for when in WHENS]
        if trials < len(points):
            points = sorted(coin.sample(points, trials))
        for round_ in range(-(-trials // len(points))):
            for number, (at, when) in enumerate(points):
                base = folder / f"{round_}-{number}"
                second = coin.randint(1, 60) if (number + round_) % 2 else 0
                kill(Life(base, scenario, direct), at, when, second, figures)
                shutil.rmtree(base)
    return figures


def main() -> None:
    name, mode, trials, seed = sys.argv[1:]
    assert not {"torch"} & set(sys.modules)
    assert "fsync" in CHANGES
    print(json.dumps(asdict(sweep_kills(name, mode == "direct", int(trials), int(seed)))))


if __name__ == "__main__":
    main()
