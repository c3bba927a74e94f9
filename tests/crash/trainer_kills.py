"""SIGKILL of real trainers with their writer processes, at random instants of a deterministic training.

    python -m crash.trainer_kills TRIALS SEED

prints what it found as JSON. It has torch imported and no thread but its first, so that trainers are forked from it.
The state is a function of the step: an undisturbed training tells what every checkpoint must hold, bit for bit.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import asyncckpt
from asyncckpt.write import client
from crash.kill_sweep import in_child
from crash.real_cuts import Child
from crash.rig import Progress, memory_folder

HOWS = ("kill", "killpg", "kill with workers", "killpg with workers", "writer too")
LIVES = 5
"""Kills that one run lives through."""
LENGTH = 400
"""Steps of which it is known what the state is. A life makes a few dozen."""
PATIENCE = 60.0
KEEP = asyncckpt.Keep(last=3)
Tell = Callable[[object], None]


@dataclass
class Figures:
    kills: dict[str, int] = field(default_factory=dict)
    staged: int = 0
    committed: int = 0
    rescued: int = 0
    """Kills after which the newest checkpoint was one that had been staged and not been reported committed."""
    violations: list[str] = field(default_factory=list)


def training() -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(96, 192), torch.nn.BatchNorm1d(192), torch.nn.Linear(192, 96))
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters()), "loop": {"step": 0}}


def advance(state: dict[str, Any]) -> int:
    """One step, of which the batch is a function of its number."""
    model, optimizer, loop = state["model"], state["optimizer"], state["loop"]
    loop["step"] += 1
    batch = torch.randn(8, 96, generator=torch.Generator().manual_seed(loop["step"]))
    model(batch).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return int(loop["step"])


def word(state: dict[str, Any]) -> str:
    """One word for all that is in it: live objects, or what was loaded of them."""
    parts = {name: part.state_dict() if hasattr(part, "state_dict") else part for name, part in state.items()}
    sum_, stack = hashlib.sha256(), [parts]
    while stack:
        here = stack.pop()
        if isinstance(here, dict):
            for key in sorted(here, key=str):
                stack += [here[key], str(key)]
        elif isinstance(here, list | tuple):
            stack += here
        elif isinstance(here, torch.Tensor):
            sum_.update(f"{here.dtype} {tuple(here.shape)};".encode() + here.detach().contiguous().numpy().tobytes())
        else:
            sum_.update(f"{here!r};".encode())
    return sum_.hexdigest()


def undisturbed(tell: Tell) -> None:
    """What the state is after every step."""
    state = training()
    words = [word(state)] + [advance(state) and word(state) for _ in range(LENGTH)]
    for start in range(0, len(words), 30):
        tell(words[start : start + 30])


def train(root: str, how: str, seed: int, tell: Tell) -> None:
    """Resume and train until killed. Tells what was restored, and which steps are staged and committed."""
    os.setsid()
    coin, state = random.Random(seed), training()

    def committed(handle: asyncckpt.SaveHandle) -> None:
        if handle.outcome == "committed":
            tell(("committed", handle.step))

    if coin.random() < 0.5:
        client.COMMAND = [sys.executable, "-P", "-m", "crash.slow_writer"]
    overlap = coin.choice([True, False])
    ckpt = asyncckpt.Checkpointer(root, keep=KEEP, overlap=overlap, max_in_flight=coin.choice([1, 2, 3]))
    restored = ckpt.restore(state)
    tell(("restored", restored, word(state), ckpt.stats().writer_pid))
    batches = iter(())
    if "workers" in how:  # forked with the link of the writer in their hands
        batches = iter(torch.utils.data.DataLoader(range(1 << 20), num_workers=1, timeout=60))
    late: list[asyncckpt.SaveHandle] = []
    while state["loop"]["step"] < LENGTH:
        next(batches, None)
        step = advance(state)
        handle = ckpt.save(step, state)
        handle.add_done_callback(committed)
        late.append(handle)
        while late and coin.random() < 0.7:  # at once, or some steps later
            handle = late.pop(0)
            if handle.wait_staged(PATIENCE):
                tell(("staged", handle.step))


class Rig:
    def __init__(self, folder: Path, seed: int) -> None:
        self.figures = Figures()
        self._folder, self._coin = folder, random.Random(seed)
        self._numbers = itertools.count()
        told, _ = in_child(undisturbed)
        self._words: list[str] = [word for words in told for word in words]  # type: ignore[attr-defined]
        assert len(self._words) == LENGTH + 1
        self._begin()

    def _begin(self) -> None:
        self.root, self._floor = str(self._folder / f"run-{next(self._numbers)}"), 0

    def kill(self) -> None:
        trial = sum(self.figures.kills.values())
        if trial % LIVES == 0 or self._floor > LENGTH // 2:
            shutil.rmtree(self.root, ignore_errors=True)
            self._begin()
        how, seed = HOWS[(trial + trial // LIVES) % len(HOWS)], self._coin.getrandbits(40)
        child = Child(lambda tell: train(self.root, how, seed, tell))
        self._wait_for_the_instant(child)
        strike(child, how)
        self.figures.kills[how] = self.figures.kills.get(how, 0) + 1
        self.figures.violations += [f"kill {trial + 1}, {how}: {why}" for why in self._broken(child.told, how)]

    def _wait_for_the_instant(self, child: Child) -> None:
        awaited = self._coin.choice(["start", "anything", "staged", "staged", "committed", "time", "time"])
        if awaited == "start":
            return child.listen(lambda _: False, self._coin.uniform(0, 0.5))
        child.listen(lambda what: what[0] == "restored", PATIENCE)
        if not child.told:
            raise RuntimeError("the trainer does not begin")
        for _ in range(self._coin.randint(0, 4)):
            child.listen(lambda what: awaited in ("anything", what[0]), 0.2)
        if awaited == "time":
            child.listen(lambda _: False, self._coin.uniform(0, 0.3))
        return None

    def _broken(self, told: list[Any], how: str) -> list[str]:
        staged = max((what[1] for what in told if what[0] == "staged"), default=0)
        committed = max((what[1] for what in told if what[0] == "committed"), default=0)
        self.figures.staged += sum(what[0] == "staged" for what in told)
        self.figures.committed += sum(what[0] == "committed" for what in told)
        broken = []
        for _, restored, state, _ in told[:1]:
            if state != self._words[restored or 0]:
                broken.append(f"what was restored is not the state of step {restored}")
            if (restored or 0) < self._floor:
                broken.append(f"restored step {restored}, where step {self._floor} had been found")
        floor = max(self._floor, committed, 0 if how == "writer too" else staged)
        answers, status = in_child(self._look)
        if status or len(answers) != 1:
            return [*broken, "recovery ended without an answer"]
        found = dict(answers[0])  # type: ignore[call-overload]
        broken += [f"step {step} is not what was saved" for step, w in found.items() if w != self._words[step]]
        newest = max(found, default=0)
        if newest < floor:
            broken.append(f"found {sorted(found)}; step {floor} had been promised (staged {staged})")
        self.figures.rescued += newest > committed and newest <= staged
        self._floor = newest
        return broken

    def _look(self, tell: Tell) -> None:
        """What is there, once the writer that was left over has let the run go."""
        with asyncckpt.Checkpointer(self.root, lock_timeout=PATIENCE, writer="thread"):
            steps = asyncckpt.open(self.root).steps()
            tell([(step, word(asyncckpt.load(self.root, step))) for step in steps])


def strike(child: Child, how: str) -> None:
    if how == "writer too" and child.told:
        os.kill(child.told[0][3], signal.SIGKILL)
    if "killpg" in how and child.told:  # then it leads a group
        os.killpg(child.pid, signal.SIGKILL)
    child.kill()
    try:
        os.killpg(child.pid, signal.SIGKILL)  # workers left over
    except ProcessLookupError:
        pass


def main() -> None:
    trials, seed = map(int, sys.argv[1:])
    with memory_folder() as folder:
        rig = Rig(folder, seed)
        progress = Progress("kills of trainers", trials)
        for _ in range(trials):
            rig.kill()
            progress.step(f"{rig.figures.rescued} staged snapshots committed after death")
    print(json.dumps(asdict(rig.figures)))


if __name__ == "__main__":
    main()
