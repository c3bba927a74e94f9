"""What torch alone offers."""

from __future__ import annotations

import copy

import torch

from benchmarks.peers.base import Background, Peer


class Nothing(Peer):
    """Saves nothing: what it shows is noise."""

    def save(self, step: int) -> None:
        self.report(step)


class TorchSave(Peer):
    def save(self, step: int) -> None:
        self._write(step, self.training.state_dict())

    def _write(self, step: int, state: object) -> None:
        torch.save(state, self.path(step))
        self.report(step)

    def restore(self, step: int) -> None:
        self.training.load_state_dict(torch.load(self.path(step), weights_only=True, map_location=self.training.device))


class DeepCopyThread(TorchSave):
    """One save at a time: the next waits for the one before."""

    _writing: Background | None = None

    def save(self, step: int) -> None:
        self.drain()
        state = copy.deepcopy(self.training.state_dict())
        self._writing = Background(lambda: self._write(step, state))

    def drain(self) -> None:
        if self._writing is not None:
            self._writing.join()
            self._writing = None
