"""An average of the weights that goes on where it was, and is exported in half precision for evaluation.

    python examples/resume/ema.py --run runs/ema

The average is a part of the state like any other. It changes outside of `optimizer.step()`, and is therefore copied
before `save` returns. `export={"ema": "bf16"}` adds `ema-bf16.safetensors` to each checkpoint, half as large, for
whoever evaluates it meanwhile; no training is ever resumed from that.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import asyncckpt

sys.path.insert(0, str(Path(__file__).parent.parent))
from resume import toy


def main(argv: list[str] | None = None) -> None:
    args = toy.arguments(__doc__, argv)
    toy.begin()
    model = toy.network()
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state = {"model": model, "ema": ema, "optimizer": optimizer, "rng": asyncckpt.RngState()}

    with asyncckpt.Checkpointer(
        args.run, cadence=asyncckpt.Every(steps=2), keep=asyncckpt.Keep(last=2), export={"ema": "bf16"}
    ) as ckpt:
        start = ckpt.restore(state) or 0
        toy.tell(f"start {start}")
        for step in range(start + 1, args.steps + 1):
            inputs, targets = toy.batch()
            loss = F.mse_loss(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update_parameters(model)
            ckpt.maybe_save(step, state)
            toy.tell(f"step {step} loss {loss.item():.6f}")

    half = asyncckpt.load(args.run, parts=["ema-bf16"])["ema-bf16"]
    toy.tell(f"{sum(t.numel() for t in half.values())} numbers exported as {half['module.0.weight'].dtype}")
    toy.tell(f"digest {toy.digest(model.state_dict(), ema.state_dict(), optimizer.state_dict())}")


if __name__ == "__main__":
    main()
