"""Lightning's `AsyncCheckpointIO`, driven as its Trainer drives it.

The Trainer takes a checkpoint for saved, and has the one before removed, when `save_checkpoint` returns; there is no
later report. So that is when it is *reported*; when the file is whole is kept as a phase, and is what is timed.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from benchmarks.model import Training
from benchmarks.peers.base import Peer


class _Noting(TorchCheckpointIO):
    """Notes when a file is whole."""

    def __init__(self) -> None:
        self.written: dict[str, float] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        super().save_checkpoint(checkpoint, path, storage_options)
        self.written[str(path)] = time.time()


class AsyncIO(Peer):
    def __init__(self, directory: Path, training: Training) -> None:
        super().__init__(directory, training)
        self._files = _Noting()
        self._io = AsyncCheckpointIO(self._files)

    def save(self, step: int) -> None:
        self._io.save_checkpoint(self.training.state_dict(), self.path(step))
        self.report(step)

    def drain(self) -> None:
        executor: ThreadPoolExecutor | None = self._io._executor
        if executor is not None:
            executor.submit(lambda: None).result()
        self.phases = {int(Path(path).name): {"whole": when} for path, when in self._files.written.items()}

    def restore(self, step: int) -> None:
        self.training.load_state_dict(self._io.load_checkpoint(self.path(step), map_location=self.training.device))

    def close(self) -> None:
        self._io.teardown()
