"""torch.distributed.checkpoint, after its recipes: one save at a time, and a stager's copy joined before the update."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from benchmarks.model import Training
from benchmarks.peers.base import Peer


class Save(Peer):
    def save(self, step: int) -> None:
        dcp.save(self.training.state_dict(), checkpoint_id=self.path(step), no_dist=True)
        self.report(step)

    def restore(self, step: int) -> None:
        state = self.training.state_dict()
        dcp.load(state, checkpoint_id=self.path(step), no_dist=True)
        self.training.load_state_dict(state)


class _Async(Save):
    kind = AsyncCheckpointerType.THREAD
    alone = True
    """Whether it works without a process group."""

    def __init__(self, directory: Path, training: Training) -> None:
        super().__init__(directory, training)
        self._upload: Future[Any] | None = None
        self._staging: Future[Any] | None = None
        self._stager: DefaultStager | None = None
        if not self.alone:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def save(self, step: int) -> None:
        self.drain()
        answer = dcp.async_save(
            self.training.state_dict(),
            checkpoint_id=self.path(step),
            no_dist=self.alone,
            async_checkpointer_type=self.kind,
            async_stager=self._stager,
        )
        if isinstance(answer, Future):
            self._upload = answer
        else:
            self._upload, self._staging = answer.upload_completion, answer.staging_completion
        self.report_when_done(step, self._upload)

    def guard(self) -> AbstractContextManager[Any]:
        return self._after_staging()

    @contextmanager
    def _after_staging(self) -> Iterator[None]:
        staging, self._staging = self._staging, None
        if staging is not None:
            staging.result()
        yield

    def drain(self) -> None:
        upload, self._upload = self._upload, None
        if upload is not None:
            upload.result()

    def close(self) -> None:
        if self._stager is not None:
            self._stager.close()
        if not self.alone:
            dist.destroy_process_group()


class AsyncThread(_Async):
    """As it comes: the state is copied anew before `async_save` returns."""


class AsyncProcess(_Async):
    kind = AsyncCheckpointerType.PROCESS
    alone = False


class AsyncThreadStager(_Async):
    """The copy is made beside the forward and backward pass, into memory that is kept."""

    shared = False

    def __init__(self, directory: Path, training: Training) -> None:
        super().__init__(directory, training)
        cuda = torch.cuda.is_available()
        options = StagingOptions(
            use_pinned_memory=cuda, use_shared_memory=self.shared, use_async_staging=True, use_non_blocking_copy=cuda
        )
        self._stager = DefaultStager(options)


class AsyncProcessStager(AsyncThreadStager):
    kind = AsyncCheckpointerType.PROCESS
    alone = False
    shared = True
