"""Data from several worker processes that goes on in the middle of an epoch.

    pip install torchdata
    python examples/resume/dataloader.py --run runs/dataloader

A `StatefulDataLoader` knows which batches it has given out, whatever its workers have read ahead. Three things make
the resumed run the same bit for bit:

- The loader has a `generator=` of its own. Otherwise it takes numbers from torch's global generator whenever an epoch
  begins, and once more when it is resumed.
- What workers draw (augmentation) depends on the item, not on the generators of the worker, which are not saved.
- Resumed after the last batch of an epoch, the loader has nothing left to give in it: the loop below begins the next.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

import asyncckpt

sys.path.insert(0, str(Path(__file__).parent.parent))
from resume import toy


class Waves(Dataset[tuple[Tensor, Tensor]]):
    """Items that are made when they are asked for, in a worker, each with noise of its own."""

    def __len__(self) -> int:
        return 45

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(index)
        inputs = torch.randn(toy.WIDTH, generator=generator)
        return inputs, inputs.sin().sum(0, keepdim=True)


def main(argv: list[str] | None = None) -> None:
    args = toy.arguments(__doc__, argv)
    toy.begin()
    model = toy.network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = StatefulDataLoader(
        Waves(), batch_size=5, shuffle=True, num_workers=2, generator=torch.Generator().manual_seed(1)
    )
    state = {"model": model, "optimizer": optimizer, "loader": loader, "rng": asyncckpt.RngState()}

    with asyncckpt.Checkpointer(args.run, cadence=asyncckpt.Every(steps=2), keep=asyncckpt.Keep(last=2)) as ckpt:
        step = ckpt.restore(state) or 0
        toy.tell(f"start {step}")
        while step < args.steps:
            for inputs, targets in loader:  # an epoch, or what is left of it
                step += 1
                loss = F.mse_loss(model(inputs), targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                ckpt.maybe_save(step, state)
                toy.tell(f"step {step} loss {loss.item():.6f}")
                if step == args.steps:
                    break

    toy.tell(f"digest {toy.digest(model.state_dict(), optimizer.state_dict())}")


if __name__ == "__main__":
    main()
