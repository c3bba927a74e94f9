"""asyncckpt. `overlap="auto"`, the default, tries both ways on its first saves: they are not counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal

import asyncckpt
from benchmarks.model import Training
from benchmarks.peers.base import Peer


class _Ours(Peer):
    overlap: bool | Literal["auto"] = "auto"

    def __init__(self, directory: Path, training: Training) -> None:
        super().__init__(directory, training)
        self._state = {"model": training.model, "optimizer": training.optimizer}
        self._open: asyncckpt.Checkpointer | None = None

    @property
    def _checkpointer(self) -> asyncckpt.Checkpointer:
        """Opened by the first save: who only restores need not own the run."""
        if self._open is None:
            keep = asyncckpt.Keep(last=2)
            self._open = asyncckpt.Checkpointer(self.directory, keep=keep, overlap=self.overlap)
        return self._open

    def prepare(self) -> None:
        self._checkpointer.prepare(self._state)

    def save(self, step: int) -> None:
        handle = self._checkpointer.save(step, self._state)
        handle.add_done_callback(lambda handle: self._note(step, handle))

    def _note(self, step: int, handle: asyncckpt.SaveHandle) -> None:
        times = handle.timeline
        if times is not None:
            self.reported[step] = times.commit_end
            names = ("copy_begin", "copy_end", "write_begin", "write_end", "commit_end")
            self.phases[step] = {name: getattr(times, name) for name in names}

    def guard(self) -> AbstractContextManager[Any]:
        return self._fenced()

    @contextmanager
    def _fenced(self) -> Iterator[None]:
        """The optimizer's hook would wait in the same way; here it can be timed."""
        self._checkpointer.fence()
        yield

    def drain(self) -> None:
        self._checkpointer.wait_until_flushed()

    def restore(self, step: int) -> None:
        asyncckpt.restore(self.directory, self._state, step)

    def path(self, step: int) -> Path:
        return self.directory / f"step-{step:08}"

    def forget(self) -> None:
        """Its `keep` has done that."""

    def close(self) -> None:
        if self._open is not None:
            self._open.close()


class Overlapped(_Ours):
    overlap = True


class Eager(_Ours):
    overlap = False


class Automatic(_Ours):
    warm_saves = 9
