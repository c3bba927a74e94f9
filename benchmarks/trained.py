"""Real numbers to compress: weights and moments of the example's GPT, trained, at two steps that follow each other.

`python -m benchmarks.trained DIRECTORY` trains `examples/train_gpt.py`'s "small" model (10.8M parameters) twice, with
AdamW's beta2 at 0.95, as the example has it, and at 0.999, torch's default. Each makes `BETA2/NAME-STEP.npy`.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import train_gpt

BETAS = (0.95, 0.999)
NAMES = ("weights", "exp_avg", "exp_avg_sq")


def train(directory: Path, betas: list[float], steps: int, threads: int) -> None:
    torch.set_num_threads(threads)
    for beta2 in betas:
        model, optimizer, scheduler, loader = train_gpt.build("small", steps, seed=0)
        for group in optimizer.param_groups:
            group["betas"] = (0.9, beta2)
        folder = directory / str(beta2)
        folder.mkdir(parents=True, exist_ok=True)
        begun = time.monotonic()
        for step in range(1, steps + 1):
            loss = train_gpt.train_step(model, optimizer, scheduler, loader)
            if step >= steps - 1:
                keep(folder, model, optimizer, step - steps)
            if step % 20 == 0:
                left = (time.monotonic() - begun) / step * (steps - step)
                print(f"beta2 {beta2}: step {step} of {steps}, loss {loss:.3f}, {left:.0f} s left", flush=True)


def keep(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """One file for each of `NAMES`, all tensors one after the other; `step` counts back from the last, 0."""
    parameters = list(model.parameters())
    found = {"weights": parameters} | {n: [optimizer.state[p][n] for p in parameters] for n in NAMES[1:]}
    for name, tensors in found.items():
        np.save(folder / f"{name}{step}.npy", torch.cat([t.detach().reshape(-1) for t in tensors]).numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--betas", type=float, nargs="*", default=list(BETAS))
    args = parser.parse_args()
    train(args.directory, args.betas, args.steps, args.threads)


if __name__ == "__main__":
    main()
