"""A training in a process of its own, which can be killed; and what its log says afterwards."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parent.parent
PATIENCE = 600.0
"""Seconds after which a training that has not ended is killed: nothing here waits for ever."""


@dataclass(frozen=True)
class Begins:
    """The training goes on after step `start`."""

    start: int


@dataclass(frozen=True)
class Step:
    """A step is over; with `saving`, `save` was called for it and has just returned."""

    step: int
    saving: bool


class Trainer:
    """`python ARGUMENTS`, started in a process group of its own."""

    def __init__(self, arguments: list[str]) -> None:
        self.finished = False
        """Whether it came to its end."""
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,
            env=environment(),
        )

    def events(self) -> Iterator[Begins | Step]:
        """What the training tells, as it tells it, to its end or death.

        Raises:
            RuntimeError: it ended by itself, with an error.
        """
        assert self._process.stdout is not None
        watchdog = threading.Timer(PATIENCE, self._process.kill)
        watchdog.start()
        try:
            for line in self._process.stdout:
                if found := re.match(r"resumed from step (\d+)|starting at step 1", line):
                    yield Begins(int(found[1] or 0))
                elif found := re.match(r"step (\d+) .*?(saving)?$", line):
                    yield Step(int(found[1]), bool(found[2]))
            code = self._process.wait()
        finally:
            watchdog.cancel()
            self._process.kill()
            self._process.wait()
            self._process.stdout.close()
        if code not in (0, -signal.SIGKILL):
            raise RuntimeError(f"the training ended with exit code {code}; what it said stands above")
        self.finished = code == 0

    def kill(self, *, group: bool) -> None:
        """SIGKILL to the trainer alone, or to its process group as a shell or launcher would."""
        if group:
            os.killpg(self._process.pid, signal.SIGKILL)
        else:
            self._process.kill()


@dataclass
class Record:
    """A log of `train_gpt.py`: everything that all runs which added to it have said."""

    losses: dict[int, str] = field(default_factory=dict)
    """By step, as `float.hex`; of a step computed more than once the last."""
    computed: list[tuple[int, str]] = field(default_factory=list)
    """Every (step, loss), steps computed again after a kill included."""
    saves: list[dict[str, Any]] = field(default_factory=list)
    digest: str | None = None

    @classmethod
    def read(cls, path: Path) -> Record:
        record = cls()
        for line in path.read_text().splitlines():
            said = json.loads(line)
            if "loss" in said:
                record.losses[said["step"]] = said["loss"]
                record.computed.append((said["step"], said["loss"]))
            elif "save" in said:
                record.saves.append(said)
            else:
                record.digest = said["digest"]
        return record


def training(args: argparse.Namespace, run: Path, log: Path) -> list[str]:
    """The command line of a training with the arguments of the demo."""
    return [str(EXAMPLES / "train_gpt.py"), "--run", str(run), "--log", str(log), *common(args)]


def common(args: argparse.Namespace) -> list[str]:
    names = ("steps", "save_every", "size", "seed", "threads")
    return [text for name in names for text in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]


def environment() -> dict[str, str]:
    """Ours, with OpenMP threads that sleep while they wait: spinning ones starve whoever shares their cores."""
    path = os.pathsep.join(filter(None, [str(EXAMPLES), os.environ.get("PYTHONPATH")]))
    return {"OMP_WAIT_POLICY": "passive", **os.environ, "PYTHONPATH": path}
