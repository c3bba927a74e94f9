"""What the examples of this folder train, and what they say: nothing here is about checkpoints."""

from __future__ import annotations

import argparse
import hashlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

WIDTH = 24


def arguments(about: str | None, argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, metavar="DIR", required=True, help="checkpoints in DIR; run again to go on")
    parser.add_argument("--steps", type=int, default=24)
    return parser.parse_args(argv)


def begin(seed: int = 0) -> None:
    """The same beginning in every process: seeds, one thread, algorithms whose sums have one order."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def network() -> nn.Sequential:
    """With weights, with buffers that the forward pass changes, and with dropout, which draws numbers."""
    return nn.Sequential(
        nn.Linear(WIDTH, 4 * WIDTH), nn.BatchNorm1d(4 * WIDTH), nn.GELU(), nn.Dropout(0.2), nn.Linear(4 * WIDTH, 1)
    )


def batch(size: int = 16) -> tuple[Tensor, Tensor]:
    """Inputs and targets, drawn from all three generators that a Python training uses."""
    inputs = torch.randn(size, WIDTH) + random.gauss(0.0, 0.1) + float(np.random.normal(0.0, 0.1))
    return inputs, inputs.sin().sum(1, keepdim=True)


def digest(*states: Any) -> str:
    """One number for all bits of nested dicts, lists, tensors and plain values."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            found.update(f"{value.dtype} {tuple(value.shape)};".encode())
            found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in value:
                add(str(key))
                add(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        else:
            found.update(f"{value!r};".encode())

    add(states)
    return found.hexdigest()


def tell(text: str) -> None:
    print(text, flush=True)
