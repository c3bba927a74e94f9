"""The random number generators of a process, as one part of the state."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from asyncckpt.errors import StateMismatchError


class RngState:
    """The states of `random`, of numpy's global generator, of torch's CPU generator, and of every CUDA device.

    Put one into the state; it holds nothing itself. Generators of your own (`numpy.random.Generator`,
    `torch.Generator`) belong into the state by their own states.
    """

    def state_dict(self) -> dict[str, Any]:
        state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
        if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            state["cuda"] = torch.cuda.get_rng_state_all()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the generators.

        Raises:
            StateMismatchError: another number of CUDA devices than at the save.
        """
        cuda = state.get("cuda")
        if cuda is not None and torch.cuda.is_available() and len(cuda) != torch.cuda.device_count():
            raise StateMismatchError(
                f"the checkpoint has RNG states of {len(cuda)} CUDA devices, and this process sees "
                f"{torch.cuda.device_count()}. Restore without this part to go on with fresh ones."
            )
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        if cuda is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(cuda)
