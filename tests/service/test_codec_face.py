"""Codecs as a training sees them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import asyncckpt
from asyncckpt.format import names


class Adapted(nn.Module):
    """A frozen linear layer of 4 MiB, and a small one beside it that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(1024, 1024, bias=False).requires_grad_(False)
        self.adapter = nn.Sequential(nn.Linear(1024, 4, bias=False), nn.Linear(4, 1024, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frozen(x) + self.adapter(x)


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(*[Adapted() for _ in range(12)])
    return model, torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), fused=True)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(4, 1024)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def copied(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(saved: dict[str, torch.Tensor], loaded: dict[str, torch.Tensor]) -> bool:
    return saved.keys() == loaded.keys() and all(torch.equal(saved[name], loaded[name]) for name in saved)


@pytest.mark.parametrize("codec", ["incremental", "zstd", "delta"])
@pytest.mark.parametrize("writer", ["process", "thread"])
def test_frozen_layers_among_trained_ones_are_not_written_again(
    tmp_path: Path, trained: Any, codec: Any, writer: Any
) -> None:
    model, optimizer = trained
    saved, written = {}, []
    with asyncckpt.Checkpointer(tmp_path, codec=codec, writer=writer) as checkpointer:
        for number in range(1, 6):
            step(model, optimizer)
            saved[number] = copied(model)
            handle = checkpointer.save(number, {"model": model, "optimizer": optimizer})
            handle.result(60)
            assert handle.timeline is not None
            written.append(handle.timeline.written)
        assert checkpointer.stats().codec == codec
        assert checkpointer.verify(5) == 5
    assert max(written[2:]) < 0.3 * written[0], written  # mixed chunks of 8 MiB are a large share of 48 MiB
    for number, state in saved.items():
        assert equal(state, asyncckpt.load(tmp_path, number)["model"])


def test_a_fused_update_of_what_was_taken_for_frozen_is_saved(tmp_path: Path, trained: Any) -> None:
    """Neither `requires_grad`, nor a version counter, nor a data pointer tells of it."""
    model, _ = trained
    with asyncckpt.Checkpointer(tmp_path, codec="zstd") as checkpointer:
        for number in range(1, 4):
            checkpointer.save(number, {"model": model}).result(60)
        frozen = model[3].frozen.weight
        before = frozen._version
        hidden = torch.optim.AdamW([alias := nn.Parameter(frozen.detach())], lr=1e-3, fused=True)
        alias.grad = torch.ones_like(alias)
        with torch.no_grad():
            hidden.step()
        assert frozen._version == before and not frozen.requires_grad
        saved = copied(model)
        checkpointer.save(4, {"model": model}).result(60)
    assert equal(saved, asyncckpt.load(tmp_path, 4)["model"])
    assert not equal(saved, asyncckpt.load(tmp_path, 3)["model"])


@pytest.mark.parametrize("codec", ["incremental", "zstd", "delta", "auto"])
def test_a_training_resumes_bit_for_bit(tmp_path: Path, codec: Any) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 300), nn.BatchNorm1d(300), nn.Linear(300, 8)).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"model": model, "optimizer": optimizer, "rng": asyncckpt.RngState()}

    def train() -> None:
        model(torch.randn(16, 64, dtype=torch.bfloat16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    with asyncckpt.Checkpointer(tmp_path, codec=codec, max_chain=2) as checkpointer:
        for number in range(1, 6):
            train()
            checkpointer.save(number, state)
        checkpointer.wait_until_flushed()
        train()
        expected = copied(model)
        assert checkpointer.restore(state) == 5
        train()
        assert equal(expected, copied(model))
    coded = list(tmp_path.glob(f"step-*/*/*{names.CODED}"))
    assert coded or codec == "auto"


@pytest.mark.parametrize(
    "options",
    [{"codec": "gzip"}, {"codec": None}, {"max_chain": 0}, {"max_chain": 65}, {"codec_cores": 0}, {"codec_cores": 1.5}],
)
def test_codecs_that_there_are_not(tmp_path: Path, options: Any) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        asyncckpt.Checkpointer(tmp_path, **options)
