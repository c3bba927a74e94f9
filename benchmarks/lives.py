"""Lives of a training that is killed again and again, for `goodput`; they run inside child processes.

A nursery has torch imported and no thread but its first. Each life is forked from it, in a session of its own, so that
a restart costs what a checkpoint library has to do with it, and not the import of torch.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint  # noqa: F401 - here, so that no life has to import it

import asyncckpt
from benchmarks import peers
from benchmarks.child import Reporter
from benchmarks.model import Shape, Training

Tell = Callable[..., None]


class Ours:
    """asyncckpt as a training script has it: it finds the newest checkpoint itself, and deletes old ones."""

    def __init__(self, tell: Tell, directory: Path, training: Training, cadence: asyncckpt.Cadence | asyncckpt.Auto):
        self._tell = tell
        self._state = {"model": training.model, "optimizer": training.optimizer}
        self._ckpt = asyncckpt.Checkpointer(directory, cadence=cadence, keep=asyncckpt.Keep(last=2))

    def resume(self, newest: int | None) -> int:
        return self._ckpt.restore(self._state) or 0

    def guard(self) -> AbstractContextManager[Any]:
        return nullcontext()  # the optimizer's hook is the fence

    def step_done(self, step: int) -> None:
        self._heard(self._ckpt.maybe_save(step, self._state))

    def save(self, step: int) -> None:
        self._heard(self._ckpt.save(step, self._state))

    def _heard(self, handle: asyncckpt.SaveHandle | None) -> None:
        if handle is not None:
            handle.add_done_callback(self._ended)

    def _ended(self, handle: asyncckpt.SaveHandle) -> None:
        if handle.outcome == "committed":
            self._tell(what="saved", step=handle.step, at=time.monotonic())

    def drain(self) -> None:
        self._ckpt.wait_until_flushed()

    @property
    def interval(self) -> float | None:
        chosen = self._ckpt.stats().interval
        return chosen.seconds if chosen else None


class Theirs:
    """A peer, every so many steps. It is told which of its checkpoints is the newest that it had reported whole."""

    interval = None

    def __init__(self, tell: Tell, directory: Path, training: Training, name: str, every: int):
        directory.mkdir(parents=True, exist_ok=True)
        self._peer, self._every = peers.make(name, directory, training), every
        report = self._peer.report

        def reported(step: int) -> None:
            report(step)
            tell(what="saved", step=step, at=time.monotonic())

        self._peer.report = reported  # type: ignore[method-assign]

    def resume(self, newest: int | None) -> int:
        if newest is None:
            return 0
        self._peer.restore(newest)
        return newest

    def guard(self) -> AbstractContextManager[Any]:
        return self._peer.guard()

    def step_done(self, step: int) -> None:
        if step % self._every == 0:
            self._peer.save(step)

    def save(self, step: int) -> None:
        self._peer.save(step)

    def drain(self) -> None:
        self._peer.drain()


def _saver(tell: Tell, directory: Path, training: Training, arm: dict[str, Any]) -> Ours | Theirs:
    if arm["peer"] != "asyncckpt":
        return Theirs(tell, directory, training, arm["peer"], arm["every"])
    auto = asyncckpt.Auto(max_overhead=arm["max_overhead"], mtbf=arm["mtbf"])
    return Ours(tell, directory, training, asyncckpt.Every(steps=arm["every"]) if arm["every"] else auto)


def nursery(tell: Reporter) -> None:
    """Fork a life for each line of standard input, one at a time: {"number", "call", and the options of that}."""
    calls = {"live": live, "pilot": pilot}
    tell(what="nursery")
    for line in sys.stdin:
        options = json.loads(line)
        number, call = options.pop("number"), calls[options.pop("call")]
        pid = os.fork()
        if pid:
            tell(what="born", number=number, pid=pid)
            os.waitpid(pid, 0)
            continue
        os.setsid()
        try:
            call(partial(tell, number=number), **options)
        except BaseException as error:
            traceback.print_exc()
            tell(number=number, what="error", text=f"{type(error).__name__}: {error}"[:300])
        os._exit(0)


def live(tell: Tell, arm: dict[str, Any], shape: dict[str, Any], directory: str, newest: int | None) -> None:
    """Resume, and train until killed. Tells each step and each save that is whole."""
    training = Training(Shape(**shape))
    training.step()  # now the optimizer has a state to be restored into
    saver = _saver(tell, Path(directory), training, arm)
    step = saver.resume(newest)
    tell(what="ready", step=step)
    chosen = None
    while True:
        training.forward_backward()
        with saver.guard():
            training.update()
        step += 1
        tell(what="step", step=step)
        saver.step_done(step)
        if saver.interval != chosen:
            chosen = saver.interval
            tell(what="interval", seconds=chosen)


def pilot(
    tell: Tell, arm: dict[str, Any], shape: dict[str, Any], directory: str, windows: int, saves: int, apart: int
) -> None:
    """What a step takes and a save costs, without failures: windows without and with saves in turn.

    Each window with saves ends `apart` steps after its last one. Tells seconds of both kinds, and the calls of saves.
    """
    training = Training(Shape(**shape))
    training.step_seconds(5)
    saver = _saver(tell, Path(directory), training, arm)
    step = 0

    def window(saving: bool) -> float:
        nonlocal step
        begun = time.perf_counter()
        for at in range(saves * apart):
            step += 1
            if saving and at % apart == 0:
                tell(what="called", step=step, at=time.monotonic())
                saver.save(step)
            training.forward_backward()
            with saver.guard():
                training.update()
        return time.perf_counter() - begun

    for _ in range(2):
        window(True)  # takes memory; and asyncckpt finds the cheaper way to copy
        saver.drain()
    for at in range(windows):
        saving = at % 4 in (1, 2)
        tell(what="window", saving=saving, seconds=window(saving), steps=saves * apart, saves=saves * saving)
        saver.drain()
    tell(what="done")
