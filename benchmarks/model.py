"""The training that is measured: a GPT with AdamW, on random tokens."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from torch.nn import functional as F

SIZES = {
    "4m": (4, 256, 1024),
    "25m": (8, 512, 8192),
    "100m": (12, 768, 8192),
    "350m": (24, 1024, 16384),
    "1b": (24, 1792, 16384),
    "3b": (32, 2560, 32768),
}
"""Layers, width, vocabulary."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    """All that a training is made from: the same shape gives the same model and the same step."""

    size: str = "100m"
    device: str = "cpu"
    dtype: str = "fp32"
    threads: int = 2
    batch: int = 1
    sequence: int = 64

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 64
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.before_attention(x)).view(batch, length, 3, self.heads, 64).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.before_mlp(x))))


class GPT(nn.Module):
    def __init__(self, layers: int, width: int, vocabulary: int, longest: int = 2048) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(longest, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Training:
    """A model, its optimizer and one batch. A step is `forward_backward` and `update`."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        torch.manual_seed(seed)
        torch.set_num_threads(shape.threads)
        self.shape = shape
        layers, width, vocabulary = SIZES[shape.size]
        self.device = torch.device(shape.device)
        self.vocabulary = vocabulary
        with self.device:
            self.model = GPT(layers, width, vocabulary).to(DTYPES[shape.dtype])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.feed(shape.batch, shape.sequence)

    def feed(self, batch: int, sequence: int) -> None:
        """Train on a batch of this size from now on."""
        tokens = torch.randint(self.vocabulary, (batch, sequence + 1), generator=torch.Generator().manual_seed(1))
        self.inputs, self.targets = tokens[:, :-1].to(self.device), tokens[:, 1:].to(self.device)

    def forward_backward(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.model(self.inputs)
        F.cross_entropy(logits.flatten(0, 1).float(), self.targets.flatten()).backward()

    def update(self) -> None:
        self.optimizer.step()
        self.synchronize()

    def step(self) -> None:
        self.forward_backward()
        self.update()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def step_seconds(self, steps: int) -> float:
        """The mean of `steps` steps."""
        begun = time.perf_counter()
        for _ in range(steps):
            self.step()
        return (time.perf_counter() - begun) / steps

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def tensors(self) -> list[Tensor]:
        """The whole state, in an order that only the model decides."""
        found = list(self.model.state_dict().values())
        for parameter in self.model.parameters():
            entry = self.optimizer.state[parameter]
            found.extend(entry[key] for key in sorted(entry) if isinstance(entry[key], Tensor))
        return found

    def size(self) -> int:
        """Bytes of the state."""
        return sum(tensor.numel() * tensor.itemsize for tensor in self.tensors())

    def fingerprint(self) -> str:
        """Equal for equal states, bit by bit."""
        digest = xxhash.xxh3_128()
        for tensor in self.tensors():
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
        return digest.hexdigest()
