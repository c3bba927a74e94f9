"""A learning-rate schedule that goes on where it was, with the random numbers of every generator.

    python examples/resume/scheduler.py --run runs/scheduler

Kill it whenever you like and run it again: it ends with the digest of a run that nobody disturbed. Schedulers are
saved as they are: they have `state_dict()`. `RngState()` is all generators of the process (Python, numpy, torch, every
CUDA device), so put one into the state of any training that draws numbers.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim import lr_scheduler

import asyncckpt

sys.path.insert(0, str(Path(__file__).parent.parent))
from resume import toy


def main(argv: list[str] | None = None) -> None:
    args = toy.arguments(__doc__, argv)
    toy.begin()
    model = toy.network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    warm_up = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5)
    cosine = lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=7, T_mult=2)
    scheduler = lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], milestones=[5])
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "rng": asyncckpt.RngState()}

    with asyncckpt.Checkpointer(args.run, cadence=asyncckpt.Every(steps=2), keep=asyncckpt.Keep(last=2)) as ckpt:
        start = ckpt.restore(state) or 0
        toy.tell(f"start {start}")
        for step in range(start + 1, args.steps + 1):
            inputs, targets = toy.batch()
            loss = F.mse_loss(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            ckpt.maybe_save(step, state)
            toy.tell(f"step {step} loss {loss.item():.6f} lr {scheduler.get_last_lr()[0]:.2e}")

    toy.tell(f"digest {toy.digest(model.state_dict(), optimizer.state_dict(), scheduler.state_dict())}")


if __name__ == "__main__":
    main()
