"""Half precision with a loss scale that goes on where it was.

    python examples/resume/scaler.py --run runs/scaler

A `GradScaler` remembers its scale and how long no gradient has overflowed; without them, a resumed run would skip
other steps. Here the first scales are far too large, so that steps are skipped and the scale falls, then grows again.
On a GPU the same lines hold with "cuda" in place of "cpu".
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import asyncckpt

sys.path.insert(0, str(Path(__file__).parent.parent))
from resume import toy


def main(argv: list[str] | None = None) -> None:
    args = toy.arguments(__doc__, argv)
    toy.begin()
    model = toy.network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=3)
    state = {"model": model, "optimizer": optimizer, "scaler": scaler, "rng": asyncckpt.RngState()}

    with asyncckpt.Checkpointer(args.run, cadence=asyncckpt.Every(steps=2), keep=asyncckpt.Keep(last=2)) as ckpt:
        start = ckpt.restore(state) or 0
        toy.tell(f"start {start}")
        for step in range(start + 1, args.steps + 1):
            inputs, targets = toy.batch()
            with torch.autocast("cpu", dtype=torch.float16):
                outputs = model(inputs)
            loss = F.mse_loss(outputs.float(), targets)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)  # nothing, where a gradient has overflowed
            scaler.update()
            ckpt.maybe_save(step, state)
            toy.tell(f"step {step} loss {loss.item():.6f} scale {scaler.get_scale():g}")

    toy.tell(f"digest {toy.digest(model.state_dict(), optimizer.state_dict(), scaler.state_dict())}")


if __name__ == "__main__":
    main()
