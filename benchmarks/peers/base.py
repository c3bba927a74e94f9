"""What the benchmark asks of every library."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from benchmarks.model import Training


class Peer:
    """A library, used as its own documentation tells, below `directory`.

    Whatever its documentation makes a training wait for is done inside `save` or on entering `guard`, and so counted.
    """

    warm_saves = 2
    """Saves after the first that are not counted."""

    def __init__(self, directory: Path, training: Training) -> None:
        self.directory, self.training = directory, training
        self.reported: dict[int, float] = {}
        """When each step was reported saved, in seconds of `time.time()`."""
        self.phases: dict[int, dict[str, float]] = {}
        """When its phases were, where the library tells."""

    def prepare(self) -> None:
        """What the library offers to do before the first save."""

    def save(self, step: int) -> None:
        """Return when the training may go on; that may be before `step` is saved."""
        raise NotImplementedError

    def guard(self) -> AbstractContextManager[Any]:
        """Held around `optimizer.step()`; entering waits until an update can't reach a save any more."""
        return nullcontext()

    def drain(self) -> None:
        """Return when every save is reported."""

    def restore(self, step: int) -> None:
        """Bring the training to `step`."""
        raise NotImplementedError

    def close(self) -> None:
        """Give up threads and processes."""

    def path(self, step: int) -> Path:
        """Where `step` is kept."""
        return self.directory / f"{step:08}"

    def forget(self) -> None:
        """Remove what is saved. Nothing is in flight."""
        for path in self.directory.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def report(self, step: int) -> None:
        self.reported[step] = time.time()

    def report_when_done(self, step: int, future: Future[Any]) -> None:
        future.add_done_callback(lambda _: self.report(step))


class Background:
    """One call on a thread of its own, and its error."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._call()
        except BaseException as error:
            self._error = error

    def running(self) -> bool:
        return self._thread.is_alive()

    def join(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error
