"""Real power cuts: a service saves on a loop-mounted file system, at a random instant that is shut down without a
flush of its log, mounted anew, and recovered.

A process of its own, without torch, so that it may fork; in a mount namespace of its own, so that nothing is left:

    unshare -m python -m crash.real_cuts ext4|xfs FOLDER CUTS SEED [VERB EXPECTED]

prints what it found as JSON; a VERB is left out by the service: a planted bug, and then it ends where that is found.
Ends with code 77, and says why, where such a disk can't be had.
"""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from asyncckpt.errors import CheckpointError
from asyncckpt.format.manifest import CHUNK_SIZE
from asyncckpt.policy.codec import Codec
from asyncckpt.policy.keep import Keep
from asyncckpt.storage import spares
from asyncckpt.storage.posix import Posix
from asyncckpt.testing import PosixWrapper, Promises, ServiceDriver, examine
from asyncckpt.testing.promises import Event, Examined, Saved, Saving
from asyncckpt.testing.service import Value, content_of_value
from asyncckpt.write import pipeline
from crash.kill_sweep import _EVENTS, in_child
from crash.loop_disk import LoopDisk, Unavailable
from crash.rig import RUN, Progress, after_sweep, sweep
from crash.scenarios import alike, value

KEEP = Keep(last=3)
LIVES = 4
"""Cuts that one run lives through; then another begins, whose folders are new."""
PATIENCE = 60.0
SKIP = 77


@dataclass
class Figures:
    cuts: int = 0
    saves: int = 0
    """Reported committed, and then cut."""
    violations: list[str] = field(default_factory=list)


class Without(PosixWrapper):
    """Leaves one verb out."""

    def __init__(self, verb: str) -> None:
        super().__init__()
        self._verb = verb

    def around(self, verb: str, arguments: tuple[Any, ...], call: Callable[..., Any]) -> Any:
        return None if verb == self._verb else call(*arguments)


def live(root: str, posix: Posix | None, seed: int, first: int, tell: Callable[[object], None]) -> None:
    """Save, overwrite, delete and rewind until the storage fails; tell of every event, and of the failure."""

    def note(event: Event) -> None:
        tell((type(event).__name__, asdict(event)))

    coin, step, mine = random.Random(seed), first, 0
    codec = Codec(coin.choice(["raw", "incremental", "zstd", "delta"]), max_chain=3)
    pipeline.CHUNK_SIZE = CHUNK_SIZE if codec.name == "raw" else 8192  # in a process of its own
    spares.SMALLEST = 0

    def content() -> Value:
        other = value(coin.getrandbits(40), parts=coin.randint(0, 3), blocks=coin.choice([1, 3, 40]))
        return other if codec.name == "raw" else {**other, **alike(coin.getrandbits(8))}

    try:
        driver = ServiceDriver(root, posix, keep=KEEP, direct=coin.random() < 0.5, codec=codec, note=note)
        while True:
            deed = coin.random()
            if mine and deed < 0.2:
                driver.save(step - 1, content(), replace=True)
            elif mine > 1 and deed < 0.25:
                driver.delete(step - 1)
                mine = 0
            elif mine > 1 and deed < 0.3:
                driver.rewind(step - 2)
                mine = 0
            else:
                numbers = [driver.begin(step + i, content()) for i in range(1 + (deed > 0.8))]
                for number in numbers:
                    driver.finish(number)
                step, mine = step + len(numbers), mine + len(numbers)
    except (CheckpointError, OSError) as error:
        tell(("Failed", {"why": f"{type(error).__name__}: {error}"}))


class Child:
    """A forked process that tells by lines."""

    def __init__(self, work: Callable[[Callable[[object], None]], None]) -> None:
        self._pipe, theirs = os.pipe()
        self._rest = b""
        self.told: list[Any] = []
        self.pid = os.fork()
        if self.pid == 0:
            try:
                work(lambda what: os.write(theirs, json.dumps(what).encode() + b"\n") and None)
            finally:
                os._exit(1)
        os.close(theirs)

    def listen(self, until: Callable[[Any], bool], seconds: float) -> None:
        """Take what it tells until one thing is such, or for so many seconds, or to its end."""
        deadline = time.monotonic() + seconds
        while True:
            if not select.select([self._pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return
            data = os.read(self._pipe, 1 << 16)
            *lines, self._rest = (self._rest + data).split(b"\n")
            news = [json.loads(line) for line in lines]
            self.told += news
            if not data or any(map(until, news)):
                return

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.listen(lambda _: False, 0)
        os.close(self._pipe)


def is_saved(what: Any) -> bool:
    return bool(what[0] == "Saved")


def has_failed(what: Any) -> bool:
    return bool(what[0] == "Failed")


class Rig:
    """Cuts on one disk, one after another."""

    def __init__(self, disk: LoopDisk, seed: int, verb: str | None) -> None:
        self.disk, self.verb = disk, verb
        self.figures = Figures()
        self._coin = random.Random(seed)

    def _begin(self) -> None:
        for old in self.disk.base.glob("run-*"):
            shutil.rmtree(old)
        base = self.disk.base / f"run-{self.figures.cuts}"
        base.mkdir()
        self.disk.sync()
        self.root, self.promises, self.step = str(base / RUN), Promises(KEEP), 1

    def cut(self) -> None:
        """A life, its end by a power cut, and recovery."""
        if self.figures.cuts % LIVES == 0:
            self._begin()
        child = self._live_and_cut()
        child.kill()
        self.disk.unmount()
        self.disk.mount()
        self._tell(child.told)
        self._recover()
        self.figures.cuts += 1

    def _live_and_cut(self) -> Child:
        seed, posix = self._coin.getrandbits(40), Without(self.verb) if self.verb else None
        child = Child(lambda tell: live(self.root, posix, seed, self.step, tell))
        if self._coin.random() < 0.5:  # just when something has been reported
            for _ in range(self._coin.randint(1, 5)):
                child.listen(is_saved, PATIENCE)
        else:  # anywhere
            child.listen(lambda _: True, PATIENCE)
            child.listen(has_failed, self._coin.uniform(0, 0.15))
        self.figures.violations += [f"before any cut: {what[1]['why']}" for what in child.told if has_failed(what)]
        self.disk.cut()
        if self._coin.random() < 0.5:  # the machine may live on for a moment: nothing is reported falsely
            child.listen(has_failed, PATIENCE)
            if not any(map(has_failed, child.told)):
                self.figures.violations.append("after the cut no save failed")
        return child

    def _tell(self, told: list[Any]) -> None:
        for name, members in told:
            if name in _EVENTS:
                event = _EVENTS[name](**members)
                self.promises.tell(event)
                self.step = max(self.step, event.step + 1)
                self.figures.saves += isinstance(event, Saved)

    def _recover(self) -> None:
        answers, status = in_child(self._recovery)
        if status or len(answers) != 2:
            answers = [["recovery ended without an answer"], {}]
        broken, contents = answers
        self.figures.violations += [f"cut {self.figures.cuts}: {why}" for why in broken]  # type: ignore[attr-defined]
        found = {int(step): word for step, word in contents.items()}  # type: ignore[attr-defined]
        self.promises = Promises(KEEP, {step: [word] for step, word in found.items()}, set(found))
        self.step += 1

    def _recovery(self, tell: Callable[[object], None]) -> None:
        """As a reader finds it, as a new owner clears it, and with the save that comes next."""
        found = examine(self.root)
        broken = self.promises.violations(found)
        if os.path.exists(self.root):
            sweep(self.root)
            broken += after_sweep(Path(self.root), found)
        after, failed = self._next_save(found)
        tell(broken + failed)
        tell(after.contents)

    def _next_save(self, found: Examined) -> tuple[Examined, list[str]]:
        word = content_of_value(value(self.step))
        known = Promises(KEEP, {step: [content] for step, content in found.contents.items()}, set(found.contents))
        try:
            with ServiceDriver(self.root, keep=KEEP) as driver:
                known.tell(Saving(self.step, word))
                driver.save(self.step, value(self.step))
                known.tell(Saved(self.step, word))
        except CheckpointError as error:
            return found, [f"the next save failed: {error}"]
        after = examine(self.root)
        return after, [f"after the next save: {why}" for why in known.violations(after)]


def main() -> None:
    kind, folder, cuts, seed, *planted = sys.argv[1:]
    verb, expected = planted or (None, "")
    assert "torch" not in sys.modules
    try:
        disk = LoopDisk(Path(folder), kind)
    except Unavailable as reason:
        print(reason)
        sys.exit(SKIP)
    rig = Rig(disk, int(seed), verb)
    progress = Progress(f"real power cuts, {kind}", int(cuts))
    for _ in range(int(cuts)):
        rig.cut()
        progress.step(f"{rig.figures.saves} saves reported committed")
        if verb and any(expected in why for why in rig.figures.violations):
            break
    print(json.dumps(asdict(rig.figures)))


if __name__ == "__main__":
    main()
