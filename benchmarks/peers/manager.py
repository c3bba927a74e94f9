"""torch_checkpointing: its tutorial; without CUDA with the settings of its troubleshooting page, and no O_DIRECT.

Its O_DIRECT writes fail on buffers that are not aligned, so on the CPU they are turned off.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch_checkpointing import CheckpointManager
from torch_checkpointing.config import AsyncCheckpointSaverConfig
from torch_checkpointing.staging import CheckpointStagerConfig
from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

from benchmarks.model import Training
from benchmarks.peers.base import Peer


class Manager(Peer):
    def __init__(self, directory: Path, training: Training) -> None:
        super().__init__(directory, training)
        self._writing: Any = None
        if torch.cuda.is_available():
            config = CheckpointManager.Config.with_async_save()
        else:
            staging = CheckpointStagerConfig(use_pinned_memory=False, use_non_blocking_copy=False)
            config = CheckpointManager.Config(
                save=AsyncCheckpointSaverConfig(staging_config=staging),
                storage_config=LocalFileSystemStorageConfig(use_direct_io=False),
            )
        self._manager = CheckpointManager(config)

    def prepare(self) -> None:
        self._manager.prewarm_staging(self.training.state_dict())

    def save(self, step: int) -> None:
        self._writing = self._manager.save(str(self.path(step)), self.training.state_dict())
        self.report_when_done(step, self._writing)

    def guard(self) -> AbstractContextManager[Any]:
        return self._manager.lock()

    def drain(self) -> None:
        if self._writing is not None:
            self._writing.result()

    def restore(self, step: int) -> None:
        into = {"model": self.training.model.state_dict(), "optimizer": None}
        loaded = self._manager.load(str(self.path(step)), into=into)
        self.training.optimizer.load_state_dict(loaded["optimizer"])

    def close(self) -> None:
        self._manager.close()
