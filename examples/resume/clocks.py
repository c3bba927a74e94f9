"""Weights saved often, for whoever evaluates them; the optimizer's state, twice as large, less often.

    python examples/resume/clocks.py --run runs/clocks

Every sixth step makes a complete checkpoint. Those between lack the optimizer's state: `load` and evaluations read
them, and a resume passes them over, goes on from the newest complete one, and saves their steps anew, with the same
bits. (`restore(state, allow_stale={"optimizer"})` would take the newest, with the optimizer's state from an older one:
less is computed again, but the training is not the same to the bit any more.)
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import asyncckpt
from asyncckpt import Every

sys.path.insert(0, str(Path(__file__).parent.parent))
from resume import toy


def main(argv: list[str] | None = None) -> None:
    args = toy.arguments(__doc__, argv)
    toy.begin()
    model = toy.network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state = {"model": model, "optimizer": optimizer, "rng": asyncckpt.RngState()}
    parts = {"model": Every(steps=2), "optimizer": Every(steps=6)}

    with asyncckpt.Checkpointer(args.run, parts=parts, keep=asyncckpt.Keep(last=2)) as ckpt:
        start = ckpt.restore(state) or 0
        toy.tell(f"start {start}")
        for step in range(start + 1, args.steps + 1):
            inputs, targets = toy.batch()
            loss = F.mse_loss(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ckpt.maybe_save(step, state)
            toy.tell(f"step {step} loss {loss.item():.6f}")

    newest = asyncckpt.load(args.run, parts=["model"])["model"]
    toy.tell(f"digest {toy.digest(newest, model.state_dict(), optimizer.state_dict())}")


if __name__ == "__main__":
    main()
