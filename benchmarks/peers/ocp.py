"""Orbax's `AsyncCheckpointer`, on numpy views of the tensors, without compression."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import torch

from benchmarks.model import Training
from benchmarks.peers.base import Background, Peer


class Orbax(Peer):
    _waiting: Background | None = None

    def __init__(self, directory: Path, training: Training) -> None:
        super().__init__(directory, training)
        self._checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_compression=False))

    def _tree(self) -> dict[str, Any]:
        """The tensors, as arrays; the plain values of an optimizer are the script's own."""
        state = self.training.state_dict()
        moments = {str(number): entry for number, entry in state["optimizer"]["state"].items()}
        return jax.tree.map(
            lambda tensor: tensor.detach().cpu().numpy(), {"model": dict(state["model"]), "moments": moments}
        )

    def save(self, step: int) -> None:
        self.drain()
        self._checkpointer.save(self.path(step), args=ocp.args.PyTreeSave(self._tree()))
        self._waiting = Background(lambda: self._finish(step))

    def _finish(self, step: int) -> None:
        self._checkpointer.wait_until_finished()
        self.report(step)

    def drain(self) -> None:
        if self._waiting is not None:
            self._waiting.join()
            self._waiting = None

    def restore(self, step: int) -> None:
        like = self._tree()
        kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), like)
        arguments = ocp.args.PyTreeRestore(item=like, restore_args=kinds)
        tree = jax.tree.map(torch.from_numpy, self._checkpointer.restore(self.path(step), args=arguments))
        state = self.training.optimizer.state_dict()
        state["state"] = {int(number): entry for number, entry in tree["moments"].items()}
        self.training.load_state_dict({"model": tree["model"], "optimizer": state})

    def close(self) -> None:
        self._checkpointer.close()
