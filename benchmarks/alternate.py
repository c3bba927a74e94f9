"""The two measurements behind `commit_speed`; they run inside child processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import asyncckpt
from benchmarks import disk, memory
from benchmarks.model import Shape, Training
from benchmarks.peers.base import Background

Tell = Callable[..., None]
_PATIENCE = 60.0


class Bench:
    """Saves of one training, and plain reads and writes of the same size, each told as a sample."""

    def __init__(self, tell: Tell, training: Training, directory: Path) -> None:
        self.tell, self.training, self.directory = tell, training, directory
        size = -(-training.size() // 4096) * 4096
        self.source, self.target = disk.Buffer(size), disk.Buffer(size)
        self.plain = directory / "plain"
        self.run = directory / "run"
        self.state = {"model": training.model, "optimizer": training.optimizer}
        self.step = 0

    def sample(self, group: str, what: str, seconds: float) -> None:
        self.tell(kind="sample", group=group, what=what, seconds=seconds)

    def write_plain(self, group: str, busy: bool) -> None:
        """An O_DIRECT write to fresh blocks; beside training steps if `busy`, else again over those blocks."""
        self.plain.unlink(missing_ok=True)
        os.sync()
        took: list[float] = []
        write = lambda: took.append(disk.write_direct(self.plain, self.source))  # noqa: E731
        if busy:
            writing = Background(write)
            while not took and writing.running():
                self.training.step()
            writing.join()
        else:
            write()
            self.sample(group, "over", disk.write_direct(self.plain, self.source))
        self.sample(group, "fresh", took[0])

    def save(self, group: str, checkpointer: asyncckpt.Checkpointer, busy: bool) -> None:
        """From the call of `save` until it is committed; then wait until the one before is removed."""
        self.step += 1
        handle = checkpointer.save(self.step, self.state)
        while busy and not handle.done():
            self.training.step()
        handle.result(_PATIENCE)
        times = handle.timeline
        assert times is not None
        if self.step > 2:  # the first saves take their memory
            self.sample(group, "save", times.commit_end - times.saved)
            self.sample(group, "write", times.write_end - times.write_begin)
        self._wait_for_removal()

    def _wait_for_removal(self) -> None:
        deadline = time.monotonic() + _PATIENCE
        while len([name for name in os.listdir(self.run) if name.startswith("step-")]) > 1:
            if time.monotonic() > deadline:
                raise TimeoutError("the checkpoint before is not removed")
            time.sleep(0.01)

    def restore(self) -> None:
        """Cold against a direct read of as many bytes, warm against a memcpy."""
        path = self.run
        for cold_first in (True, False):
            for cold in (cold_first, not cold_first):
                if cold:
                    disk.evict(path)
                    self.sample("restore", "cold", disk.timed(lambda: asyncckpt.restore(path, self.state)))
                    self.sample("restore", "direct read", disk.read(self.plain, self.target, direct=True))
                else:
                    for file in path.rglob("*.safetensors"):
                        file.read_bytes()
                    self.sample("restore", "warm", disk.timed(lambda: asyncckpt.restore(path, self.state)))
                    self.sample("restore", "memcpy", disk.copy(self.target, self.source))


def speed(tell: Tell, shape: Shape, directory: Path, rounds: int) -> None:
    """Alternate saves with plain writes: beside nothing, then beside training; then restores."""
    training = Training(shape)
    training.step_seconds(2)
    bench = Bench(tell, training, directory)
    tell(kind="size", size=bench.source.size)
    with asyncckpt.Checkpointer(bench.run, keep=asyncckpt.Keep(last=1), overlap=True) as checkpointer:
        checkpointer.prepare(bench.state)
        for _ in range(2):
            bench.save("warm up", checkpointer, busy=False)
        for group, busy in (("idle", False), ("busy", True)):
            for _ in range(rounds):
                bench.write_plain(group, busy)
                bench.save(group, checkpointer, busy)
                bench.save(group, checkpointer, busy)
                bench.write_plain(group, busy)
    for _ in range(rounds):
        bench.restore()


def endurance(tell: Tell, directory: Path, saves: int) -> None:
    """Save a small state many times, and read memory after every second save, when nothing is in flight."""
    training = Training(Shape("4m", sequence=8))
    training.step_seconds(2)
    tell(phase="without")
    training.step_seconds(5)
    tell(phase="")
    state = {"model": training.model, "optimizer": training.optimizer}
    with asyncckpt.Checkpointer(directory, keep=asyncckpt.Keep(last=2), overlap=True) as checkpointer:
        tell(phase="with")
        for step in range(2):  # both arenas, or the second is taken at some save in the middle
            handle = checkpointer.save(step, state)
        handle.result(_PATIENCE)
        for step in range(2, saves):
            handle = checkpointer.save(step, state)
            training.step()
            if step % 2:
                handle.result(_PATIENCE)
                tell(kind="reading", bytes=memory.usage(os.getpid()))
        checkpointer.wait_until_flushed(_PATIENCE)
        tell(phase="")
    tell(kind="peaks", state=training.size(), in_flight=2, saves=saves, apart=2)
