"""The measured loop, and the measurements made of it; all of this runs inside a child process."""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import disk
from benchmarks.model import Shape, Training
from benchmarks.peers.base import Peer

Tell = Callable[..., None]
_EPOCH = time.time() - time.perf_counter()


def _now() -> float:
    """Seconds of `time.time()`, on a clock that is never set back."""
    return time.perf_counter() + _EPOCH


class Loop:
    """A training that saves with one peer; steps are numbered through."""

    def __init__(self, training: Training, peer: Peer) -> None:
        self.training, self.peer = training, peer
        self.number = 0

    def window(self, steps: int, every: int) -> dict[str, Any]:
        """`steps` steps with a save before each `every`-th (never with 0), and the wait until all are saved."""
        saves: list[dict[str, Any]] = []
        ticks: list[tuple[float, float, float]] = []
        begun = _now()
        for i in range(steps):
            begin = _now()
            blocked = 0.0
            if every and i % every == 0:
                self.number += 1
                self.peer.save(self.number)
                blocked = _now() - begin
                saves.append({"step": self.number, "called": begin, "returned": begin + blocked, "blocked": blocked})
            self.training.forward_backward()
            joining = _now()
            with self.peer.guard():
                joined = _now() - joining
                self.training.update()
            if saves:
                saves[-1]["blocked"] += joined
            ticks.append((begin, _now(), blocked + joined))
        if every:
            self.peer.drain()
        wall = _now() - begun
        for save in saves:
            step = save["step"]
            save["phases"] = self.peer.phases.get(step, {})
            save["done"] = save["phases"].get("whole", self.peer.reported.get(step))
        return {"every": every, "steps": steps, "wall": wall, "saves": saves, "ticks": ticks}


def timing(tell: Tell, training: Training, peer_of: Callable[[], Peer], schedule: list[list[int]]) -> None:
    """All that is timed of one peer, with the windows of `schedule` ([save every, steps]) in turn.

    Memory is read by the parent while a phase is told; nothing is timed then.
    """
    training.step_seconds(2)
    tell(phase="without")
    training.step_seconds(3)
    tell(phase="")
    peer = peer_of()
    loop = Loop(training, peer)
    peer.prepare()
    training.step_seconds(3)
    tell(kind="first", **loop.window(2, 2))
    loop.window(peer.warm_saves, 1)
    _clean(peer)
    for every, steps in schedule:
        record = loop.window(steps, every)
        if record["saves"]:
            record["bytes"] = disk.bytes_below(peer.path(loop.number)) if peer.path(loop.number).exists() else 0
            record["sync"] = disk.timed(lambda: _sync(peer.directory))
            _clean(peer)
        tell(kind="window", **record)
    tell(phase="with")
    loop.window(4, 1)
    tell(phase="")
    peer.close()


def _clean(peer: Peer) -> None:
    peer.forget()
    _sync(peer.directory)


def _sync(directory: Path) -> None:
    """Write what is dirty on this file system."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        ctypes.CDLL(None).syncfs(fd)
    finally:
        os.close(fd)


def save_once(tell: Tell, training: Training, peer: Peer, last_words: bool) -> None:
    """Save, train on, and tell the moment that the peer reports the save; then wait to be killed, or leave.

    The state of the save is told by its fingerprint: what comes back must be that, though the training went on.
    """
    training.step_seconds(2)
    peer.prepare()
    fingerprint = training.fingerprint()
    peer.save(1)
    if 1 not in peer.reported:
        training.forward_backward()
        with peer.guard():
            training.update()
        while 1 not in peer.reported:
            time.sleep(0.0005)
    tell(kind="saved", step=1, fingerprint=fingerprint)
    if last_words:
        peer.drain()
        peer.close()
    else:
        input()


def restore(tell: Tell, training: Training, peer: Peer, step: int, fingerprint: str, repeats: int) -> None:
    """Bring a training to `step`: cold, then warm, each `repeats` times. Tells seconds, and whether it was exact."""
    training.step_seconds(1)
    cold, warm = [], []
    for _ in range(repeats):
        disk.evict(peer.path(step))
        cold.append(disk.timed(lambda: (peer.restore(step), training.synchronize())))
    exact = training.fingerprint() == fingerprint
    disk.timed(lambda: [file.read_bytes() for file in _files(peer.path(step))])
    for _ in range(repeats):
        warm.append(disk.timed(lambda: (peer.restore(step), training.synchronize())))
    tell(kind="restored", cold=cold, warm=warm, exact=exact, bytes=disk.bytes_below(peer.path(step)))


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]


def calibrate(tell: Tell, shape: Shape, factor: float) -> None:
    """Find the batch whose step takes `factor` times the copy of the state by one thread, and tell it."""
    training = Training(shape)
    training.step_seconds(2)
    size = training.size()
    copy = _copy_seconds(training, size)
    goal = factor * copy

    def seconds(tokens: int) -> float:
        training.feed(*_batch(tokens))
        training.step()
        return statistics.median(training.step_seconds(1) for _ in range(3))

    low, high = 8, 128
    while seconds(high) < goal and high < 1 << 17:
        low, high = high, high * 4
    least = seconds(low)
    most = seconds(high)
    for _ in range(3):
        share = (goal - least) / max(most - least, 1e-9)
        tokens = max(8, round(low + share * (high - low)))
        step = seconds(tokens)
        if abs(step / goal - 1) < 0.05 or tokens == 8:
            break
        if step < goal:
            low, least = tokens, step
        else:
            high, most = tokens, step
    batch, sequence = _batch(tokens)
    tell(kind="calibrated", size=size, copy=copy, step=step, batch=batch, sequence=sequence)


def _batch(tokens: int) -> tuple[int, int]:
    """Sequences of at most 512 tokens, all of one length."""
    batch = -(-tokens // 512)
    return batch, tokens // batch


def _copy_seconds(training: Training, size: int) -> float:
    """Of one copy of the state, as fast as one thread, or the bus, makes it."""
    if training.device.type == "cuda":
        from benchmarks.machine import pinned_copy

        return pinned_copy(size, 5)
    whole = -(-size // 4096) * 4096
    source, target = disk.Buffer(whole), disk.Buffer(whole)
    return statistics.median(disk.copy(target, source) for _ in range(5))
