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
            StateMismatchError: it is no such state, or has another number of CUDA devices; nothing was changed.
        """
        if (why := unfit(state)) is not None:
            raise StateMismatchError(f"the state of the generators can't be set: {why}")
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        if state.get("cuda") is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda"])


def unfit(state: Any) -> str | None:
    """Why `state` is none that `RngState` can take, tried on generators of nobody's; None where it is.

    numpy itself takes any position, and would read beyond its memory.
    """
    try:
        random.Random().setstate(state["python"])
        if isinstance(state["numpy"], tuple):
            _, key, position, *_ = state["numpy"]
            if np.shape(key) != (624,) or type(position) is not int or not 0 <= position <= 624:
                return "not a state of numpy's global generator"
            np.random.RandomState().set_state(state["numpy"])
        elif state["numpy"]["bit_generator"] == "MT19937":
            return "not a state of numpy's global generator"
        torch.Generator().set_state(state["torch"])
        cuda = state.get("cuda")
        if cuda is not None and not all(isinstance(c, torch.Tensor) and c.dtype == torch.uint8 for c in cuda):
            return "not states of CUDA generators"
        if cuda is not None and torch.cuda.is_available():
            return _unfit_for_devices(cuda)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        return f"not the states of the generators: {type(error).__name__}: {error}"
    return None


def _unfit_for_devices(states: list[torch.Tensor]) -> str | None:
    if len(states) != torch.cuda.device_count():
        return (
            f"of {len(states)} CUDA devices, and this process sees {torch.cuda.device_count()}; restore without this "
            "part to go on with fresh ones"
        )
    if any(state.shape != torch.cuda.get_rng_state(i).shape for i, state in enumerate(states)):
        return "not states of CUDA generators"
    return None
