"""The lives of `benchmarks.lives` from outside: a supervisor that lets them live, hears them, and kills them."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asyncckpt.policy.simulate import exponential
from benchmarks.child import Child, ChildError, Record
from benchmarks.memory import tree

ARMS: dict[str, dict[str, Any]] = {
    "asyncckpt, Auto": {"peer": "asyncckpt", "fixed": False},
    "asyncckpt, fixed": {"peer": "asyncckpt", "fixed": True},
    "DCP async_save": {"peer": "dcp.async thread", "fixed": True},
    "torch.save": {"peer": "torch.save", "fixed": True},
}
"""Fixed: at the interval that the planner finds best for the costs that the pilot measured of this peer."""
_PASSIVE = ("env", "OMP_WAIT_POLICY=passive")
"""Else a training thread that waits for the other takes the core that the saving needs, whatever library saves."""
_PATIENCE = 120.0
_numbers = itertools.count(1)
"""Of lives: what a dead one has told is not taken for the words of the next."""


@dataclass(frozen=True)
class Setting:
    """How the comparison is made. `kills` are those of one round of one arm; `mtbf` is in seconds."""

    mtbf: float = 5.0
    kills: int = 5
    size: str = "4m"
    sequence: int = 64
    threads: int = 2
    max_overhead: float = 0.1
    windows: int = 8
    restarts: int = 3

    @property
    def shape(self) -> dict[str, Any]:
        return {"size": self.size, "sequence": self.sequence, "threads": self.threads}


class Supervisor:
    """Lets an arm live and die, in `directory`."""

    def __init__(self, child: Child, setting: Setting, name: str, every: int, directory: Path) -> None:
        self._child, self._setting, self._directory = child, setting, directory
        auto = {"max_overhead": setting.max_overhead, "mtbf": setting.mtbf}
        self._arm = {"peer": ARMS[name]["peer"], "every": every, **auto}
        self._number = self._pid = 0
        self.newest: int | None = None
        """The newest step that was reported whole."""

    def begin(self, call: str = "live", **options: Any) -> None:
        self._number = next(_numbers)
        self._pid = 0
        if call == "live":
            options["newest"] = self.newest
        shape, directory = self._setting.shape, str(self._directory)
        self._child.say(number=self._number, call=call, arm=self._arm, shape=shape, directory=directory, **options)

    def hear(self, until: float, last: str = "") -> list[Record]:
        """What the life tells until then, or until it tells `last`.

        Raises:
            ChildError: it failed.
        """
        found = []
        for record in self._child.listen(until):
            if record.get("number") != self._number:
                continue
            if record["what"] == "error":
                raise ChildError(f"{self._arm['peer']}: {record['text']}")
            if record["what"] == "born":
                self._pid = record["pid"]
            if record["what"] == "saved":
                self._saved(record["step"])
            found.append(record)
            if record["what"] == last:
                return found
        if last:
            raise ChildError(f"{self._arm['peer']}: no word of {last!r}: {self._child.last_words()}")
        return found

    def _saved(self, step: int) -> None:
        self.newest = max(step, self.newest or 0)
        if self._arm["peer"] != "asyncckpt":  # which does this itself; for the others it costs no time of theirs
            for path in self._directory.iterdir():
                if path.name < f"{self.newest:08}":
                    _remove(path)

    def kill(self) -> list[Record]:
        """SIGKILL to the life and all that it started. Returns what it had told and was not yet heard."""
        found = [] if self._pid else self.hear(time.monotonic() + _PATIENCE, "born")
        for pid in tree(self._pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        found += self.hear(time.monotonic())
        if self._arm["peer"] != "asyncckpt" and self._directory.exists():  # what was being written is no checkpoint
            for path in self._directory.iterdir():
                if path.name != f"{self.newest or 0:08}":
                    _remove(path)
        return found


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def nursery(limit: float) -> Iterator[Child]:
    """A process that lives are forked from, ready to; see `benchmarks.lives`.

    Raises:
        ChildError: it can't be had.
    """
    with Child("nursery", limit, wrap=_PASSIVE) as child:
        if not any(record["what"] == "nursery" for record in child.listen(time.monotonic() + _PATIENCE)):
            raise ChildError(child.last_words())
        yield child


def measure_costs(child: Child, setting: Setting, name: str, directory: Path) -> Record:
    """The pilot of an arm: windows without failures, then restarts."""
    supervisor = Supervisor(child, setting, name, 10**9, directory)
    supervisor.begin("pilot", windows=setting.windows, saves=4, apart=10)
    told = supervisor.hear(time.monotonic() + _PATIENCE, "done")
    supervisor.kill()
    restarts = []
    for _ in range(setting.restarts):
        begun = time.monotonic()
        supervisor.begin()
        ready = supervisor.hear(begun + _PATIENCE, "ready")[-1]
        restarts.append(time.monotonic() - begun)
        if ready["step"] != supervisor.newest:
            raise ChildError(f"{name}: resumed at {ready['step']}, where {supervisor.newest} was reported whole")
        supervisor.kill()
    return {"kind": "pilot", "peer": ARMS[name]["peer"], "told": told, "restarts": restarts}


def gaps(setting: Setting, seed: int) -> list[float]:
    """Seconds from one failure to the next, in one round."""
    instants = [0.0, *itertools.islice(exponential(setting.mtbf, seed), setting.kills)]
    return [after - before for before, after in itertools.pairwise(instants)]


def play(child: Child, setting: Setting, name: str, every: int, directory: Path, seed: int) -> Record:
    """One round of an arm: from the first life's first step to the last kill."""
    supervisor = Supervisor(child, setting, name, every, directory)
    lives: list[Record] = []
    supervisor.begin()
    told = supervisor.hear(time.monotonic() + _PATIENCE, "ready")
    begun = now = time.monotonic()
    due = begun
    for gap in gaps(setting, seed):
        due += gap
        told += supervisor.hear(due)
        told += supervisor.kill()
        lives.append(_life(told, supervisor.newest, time.monotonic() - now))
        now = time.monotonic()
        supervisor.begin()
        told = []
    left = supervisor.hear(time.monotonic() + _PATIENCE, "ready")[-1]["step"]
    supervisor.kill()
    check_nothing_was_lost(name, lives, left)
    wall = now - begun
    return {"kind": "round", "arm": name, "seed": seed, "every": every, "wall": wall, "useful": left, "lives": lives}


def _life(told: list[Record], newest: int | None, seconds: float) -> Record:
    """`steps` are those that were made, useful or not; `start` is None where it was killed before it had resumed."""
    start = next((r["step"] for r in told if r["what"] == "ready"), None)
    last = max((r["step"] for r in told if r["what"] == "step"), default=start)
    return {
        "seconds": seconds,
        "start": start,
        "steps": 0 if start is None or last is None else last - start,
        "saves": sum(r["what"] == "saved" for r in told),
        "newest": newest or 0,
        "intervals": [r["seconds"] for r in told if r["what"] == "interval" and r["seconds"]],
    }


def check_nothing_was_lost(name: str, lives: list[Record], left: int) -> None:
    """Each life resumes from what had been reported whole, or from a later step."""
    starts = [life["start"] for life in lives[1:]] + [left]
    for life, start in zip(lives, starts, strict=True):
        if start is not None and start < life["newest"]:
            raise ChildError(f"{name}: resumed at {start}, where {life['newest']} had been reported whole")
