"""Train a small byte-level GPT on the source code of Python's standard library, with asynchronous checkpoints.

    python examples/train_gpt.py --run runs/gpt --steps 500 --save-every 10    train; run it again to go on
    python examples/train_gpt.py                                               the demo: kill it, resume it, compare

`train` below is what a training script needs of asyncckpt. The demo around it lives in the folder `demo`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import sysconfig
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import asyncckpt


def train(args: argparse.Namespace, log: Log) -> None:
    """Train up to step `args.steps`, going on from the newest checkpoint in `args.run` if there is one."""
    model, optimizer, scheduler, loader = build(args.size, args.steps, args.seed)
    state = {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "loader": loader,
        "rng": asyncckpt.RngState(),
    }
    cadence, keep = asyncckpt.Every(steps=args.save_every), asyncckpt.Keep(last=3)

    with asyncckpt.Checkpointer(args.run, cadence=cadence, keep=keep) if args.save else nullcontext() as ckpt:
        start = (ckpt.restore(state) if ckpt else None) or 0
        log.begins(start)
        for step in range(start + 1, args.steps + 1):
            begun = time.time()
            loss = train_step(model, optimizer, scheduler, loader)
            handle = ckpt.maybe_save(step, state) if ckpt else None  # returns at once; the rest happens meanwhile
            log.step(step, loss, begun, handle)

    log.ends(args.steps, digest({"model": model.state_dict(), "optimizer": optimizer.state_dict()}))


def train_step(model: GPT, optimizer: torch.optim.Optimizer, scheduler: Any, loader: Loader) -> float:
    inputs, targets = next(loader)
    loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    return loss.item()


# The model


@dataclass(frozen=True)
class Size:
    layers: int
    heads: int
    width: int
    block: int
    """Tokens the model sees at once."""
    batch: int
    dropout: float = 0.1


SIZES = {
    "tiny": Size(layers=2, heads=2, width=128, block=32, batch=4),
    "small": Size(layers=6, heads=6, width=384, block=64, batch=4),
    "medium": Size(layers=12, heads=12, width=768, block=256, batch=8),
}
VOCABULARY = 256
"""A token is a byte."""


class Block(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads, self.dropout = size.heads, size.dropout
        self.norm_1, self.norm_2 = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.qkv = nn.Linear(size.width, 3 * size.width)
        self.out = nn.Linear(size.width, size.width)
        self.mlp = nn.Sequential(
            nn.Linear(size.width, 4 * size.width), nn.GELU(), nn.Linear(4 * size.width, size.width)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm_1(x)).chunk(3, -1))
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        x = x + F.dropout(self.out(attended.transpose(1, 2).flatten(2)), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.norm_2(x)), self.dropout, self.training)


class GPT(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, size.width)
        self.positions = nn.Embedding(size.block, size.width)
        self.blocks = nn.Sequential(*(Block(size) for _ in range(size.layers)))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, VOCABULARY, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("out.weight", "mlp.2.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * size.layers) if residual else 0.02)
        self.head.weight = self.tokens.weight  # tied: stored once, tied again by restore

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        return self.head(self.norm(self.blocks(x)))


# The data


class Loader:
    """Batches of windows of `text`, each window once an epoch in random order. Its state is two numbers."""

    def __init__(self, text: Tensor, size: Size, seed: int) -> None:
        self.text, self.size, self.seed = text, size, seed
        self.windows = (len(text) - 1) // size.block
        self.epoch, self.position = 0, 0
        self._shuffle()

    def __next__(self) -> tuple[Tensor, Tensor]:
        if self.position + self.size.batch > self.windows:
            self.epoch, self.position = self.epoch + 1, 0
            self._shuffle()
        chosen = self.order[self.position : self.position + self.size.batch]
        self.position += self.size.batch
        index = chosen[:, None] * self.size.block + torch.arange(self.size.block)
        return self.text[index].long(), self.text[index + 1].long()

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        self._shuffle()

    def _shuffle(self) -> None:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        self.order = torch.randperm(self.windows, generator=generator)


def read_text(limit: int = 2_000_000) -> Tensor:
    """The first `limit` bytes of the modules of the standard library, by name: every machine has this text."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= limit:
            break
    if not text:
        raise SystemExit("this Python has no sources of its standard library to train on")
    return torch.frombuffer(text[:limit], dtype=torch.uint8)


# The rest


def build(size_name: str, steps: int, seed: int) -> tuple[GPT, torch.optim.Optimizer, Any, Loader]:
    """Model, optimizer, scheduler and loader, the same ones for the same arguments."""
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)
    size = SIZES[size_name]
    model = GPT(size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    warm_up = max(1, steps // 10)

    def schedule(step: int) -> float:
        """A linear warm-up, then half a cosine down to a tenth."""
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.55 + 0.45 * math.cos(math.pi * min(1.0, (step - warm_up) / max(1, steps - warm_up)))

    return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule), Loader(read_text(), size, seed)


def digest(state: Any) -> str:
    """One number for all bits of nested dicts, lists, tensors and plain values."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            add(f"{value.dtype} {tuple(value.shape)}")
            found.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, dict):
            for key in sorted(value, key=repr):
                add(key)
                add(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        else:
            found.update(f"{value!r};".encode())

    add(state)
    return found.hexdigest()


class Log:
    """Tells of the training on stdout, and in a file of JSON lines that later runs add to."""

    def __init__(self, path: Path | None) -> None:
        self._file = path.open("a", buffering=1) if path else None
        self._saves: list[asyncckpt.SaveHandle] = []

    def begins(self, start: int) -> None:
        print(f"resumed from step {start}" if start else "starting at step 1", flush=True)

    def step(self, step: int, loss: float, begun: float, handle: asyncckpt.SaveHandle | None) -> None:
        seconds = time.time() - begun
        self._write({"step": step, "loss": loss.hex(), "time": seconds})
        print(f"step {step}  loss {loss:.4f}  {seconds:.3f} s{'  saving' if handle else ''}", flush=True)
        if handle is not None:
            self._saves.append(handle)

    def ends(self, step: int, state_digest: str) -> None:
        for save in self._saves:
            if save.timeline is not None:
                self._write({"save": save.step, "blocked": save.blocked, **asdict(save.timeline)})
        self._write({"end": step, "digest": state_digest})
        print(f"done: {step} steps, digest {state_digest[:16]}", flush=True)

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, metavar="DIR", help="train, with checkpoints in DIR")
    parser.add_argument("--no-save", dest="save", action="store_false", help="train without checkpoints")
    parser.add_argument("--steps", type=int, default=36)
    parser.add_argument("--save-every", type=int, default=1, metavar="K", help="save every K steps")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="of torch; another number gives other last bits")
    parser.add_argument("--log", type=Path, metavar="FILE", help="add JSON lines: step, loss (as float.hex), time")
    demo = parser.add_argument_group("the demo (without --run and --no-save)")
    demo.add_argument("--demo-dir", type=Path, metavar="DIR", default=Path("runs/demo"))
    demo.add_argument("--kills", type=int, default=3)
    return parser.parse_args(argv)


def main() -> int:
    args = parse()
    torch.set_num_threads(args.threads)
    if args.run is None and args.save:
        from demo.supervise import demo

        return demo(args)
    train(args, Log(args.log))
    return 0


if __name__ == "__main__":
    sys.exit(main())
