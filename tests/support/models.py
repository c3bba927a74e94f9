"""Small training states."""

from __future__ import annotations

from typing import Any

import torch

import asyncckpt


def training(width: int = 64, layers: int = 3, seed: int = 0) -> dict[str, Any]:
    """A model and AdamW that has made one step."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(layers)))
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"model": model, "optimizer": optimizer, "rng": asyncckpt.RngState()}
    train_step(state)
    return state


def train_step(state: dict[str, Any]) -> float:
    model, optimizer = state["model"], state["optimizer"]
    loss = model(torch.randn(4, model[0].in_features)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def weights(state: dict[str, Any]) -> list[torch.Tensor]:
    return [p.detach().clone() for p in state["model"].parameters()]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
