"""torchsnapshot: `Snapshot.async_take`, one at a time."""

from __future__ import annotations

from typing import Any

from torchsnapshot import Snapshot
from torchsnapshot.snapshot import PendingSnapshot

from benchmarks.peers.base import Background, Peer


class AsyncTake(Peer):
    _waiting: Background | None = None

    def _app_state(self) -> dict[str, Any]:
        return {"model": self.training.model, "optimizer": self.training.optimizer}

    def save(self, step: int) -> None:
        self.drain()
        pending = Snapshot.async_take(str(self.path(step)), self._app_state())
        self._waiting = Background(lambda: self._finish(step, pending))

    def _finish(self, step: int, pending: PendingSnapshot) -> None:
        pending.wait()
        self.report(step)

    def drain(self) -> None:
        if self._waiting is not None:
            self._waiting.join()
            self._waiting = None

    def restore(self, step: int) -> None:
        Snapshot(str(self.path(step))).restore(self._app_state())
