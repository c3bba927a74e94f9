"""What is left out of a save because it is what was committed last: by its bytes, and never by mistake."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs
from support import chunks
from torch import nn

import asyncckpt
from asyncckpt.snapshot import known
from asyncckpt.snapshot.hashed import Chunk
from asyncckpt.snapshot.snapshotter import Snapshotter
from asyncckpt.storage.local import LocalStorage
from asyncckpt.write import messages as m

CHUNK = 1 << 14
LEFT_OUT: list[m.Hashed] = []


@pytest.fixture(autouse=True)
def seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small chunks, for a writer in this process; what the writer is told to be the same is noted."""
    chunks.make_small(monkeypatch, CHUNK)
    LEFT_OUT.clear()
    tell_the_writer(monkeypatch, lambda same: same)


def tell_the_writer(monkeypatch: pytest.MonkeyPatch, change: Callable[[m.Hashed], m.Hashed]) -> None:
    take = Snapshotter.take

    def spying(self: Snapshotter, what: Any, arena: Any, overlap: bool, staged: Any, *rest: Any) -> Any:
        def seen(upto: int, hashed: list[m.Hashed]) -> None:
            LEFT_OUT.extend(chunk for chunk in hashed if chunk.same)
            staged(upto, [change(chunk) if chunk.same else chunk for chunk in hashed])

        return take(self, what, arena, overlap, seen, *rest)

    monkeypatch.setattr(Snapshotter, "take", spying)


def model(width: int = 64, layers: int = 6) -> nn.Module:
    """Frozen layers of whole chunks and small ones, and one that is trained."""
    torch.manual_seed(0)
    frozen = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers))).requires_grad_(False)
    return nn.ModuleDict({"frozen": frozen, "head": nn.Linear(width, 8)})


def training(net: nn.Module) -> dict[str, Any]:
    return {"model": net, "optimizer": torch.optim.SGD((p for p in net.parameters() if p.requires_grad), 0.1, 0.9)}


def step(state: dict[str, Any]) -> None:
    net = state["model"]
    net["head"](net["frozen"](torch.randn(2, 64))).square().mean().backward()
    state["optimizer"].step()
    state["optimizer"].zero_grad()


def image(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def equals(path: Path, number: int, saved: dict[str, torch.Tensor], part: str = "model") -> bool:
    loaded = asyncckpt.load(path, step=number)[part]
    return loaded.keys() == saved.keys() and all(torch.equal(loaded[name], saved[name]) for name in saved)


def checkpointer(path: Path, **options: Any) -> asyncckpt.Checkpointer:
    return asyncckpt.Checkpointer(path, **{"codec": "zstd", "writer": "thread", **options})


@pytest.mark.parametrize("overlap", [False, True, "auto"])
@pytest.mark.parametrize("codec", ["incremental", "zstd", "delta"])
def test_frozen_layers_are_left_out_and_come_back(tmp_path: Path, overlap: Any, codec: Any) -> None:
    state, saved = training(model()), {}
    with checkpointer(tmp_path, overlap=overlap, codec=codec) as ckpt:
        for number in range(1, 6):
            step(state)
            saved[number] = image(state["model"])
            LEFT_OUT.clear()
            assert ckpt.save(number, state).result(60) == "committed"
            assert bool(LEFT_OUT) == (number > 2)
    frozen = sum(p.nbytes for p in state["model"]["frozen"].parameters())
    assert len({chunk.start for chunk in LEFT_OUT if chunk.part == "model"}) >= frozen // CHUNK - 2
    for number in saved:
        assert asyncckpt.open(tmp_path).verify(number) == number and equals(tmp_path, number, saved[number])


@pytest.mark.parametrize("overlap", [False, True])
def test_chunks_of_parameters_and_buffers_are_left_out(tmp_path: Path, overlap: Any) -> None:
    """What waits for the fence and what does not may lie in one chunk."""
    layers = (nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64)) for _ in range(12))
    net = nn.Sequential(*layers)
    state = {"model": net, "optimizer": torch.optim.SGD(net.parameters(), 0.1)}
    with checkpointer(tmp_path, overlap=overlap, codec="incremental") as ckpt:
        for number in range(1, 6):
            LEFT_OUT.clear()
            assert ckpt.save(number, state).result(60) == "committed"
    assert sum(chunk.size for chunk in LEFT_OUT) > sum(tensor.nbytes for tensor in net.state_dict().values())


def through_data(p: torch.Tensor) -> None:
    p.data[3, 3] += 1


def through_numpy(p: torch.Tensor) -> None:
    p.detach().numpy()[5] = 7


def fused(p: torch.Tensor) -> None:
    about = {"weight_decay": 0.0, "momentum": 0.0, "lr": 1.0, "dampening": 0.0, "nesterov": False, "maximize": False}
    torch._fused_sgd_([p.detach()], [torch.ones_like(p)], [], is_first_step=True, **about)


def through_memory(p: torch.Tensor) -> None:
    ctypes.memset(p.data_ptr() + 8, 3, 1)


def replaced(p: torch.Tensor) -> None:
    p.data = p.data.flip(0)


UNSEEN: list[Callable[[torch.Tensor], None]] = [through_data, through_numpy, fused, through_memory, replaced]


def change_unseen(path: Path, change: Callable[[torch.Tensor], None], overlap: Any) -> None:
    state = training(model())
    with checkpointer(path, overlap=overlap) as ckpt:
        for number in (1, 2, 3):
            assert ckpt.save(number, state).result(60) == "committed"
        with torch.no_grad():
            change(state["model"]["frozen"][2].weight)
        assert ckpt.save(4, state).result(60) == "committed"
        assert ckpt.save(5, state).result(60) == "committed"
    for number in (4, 5):
        assert equals(path, number, image(state["model"])), number


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("change", UNSEEN)
def test_a_change_that_no_counter_tells_is_saved(
    tmp_path: Path, change: Callable[[torch.Tensor], None], overlap: Any
) -> None:
    change_unseen(tmp_path, change, overlap)


def test_a_planted_trust_in_counters_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare = known.Comparison._copy_changed
    versions: dict[int, int] = {}

    def trusting(self: known.Comparison, chunk: Chunk, segments: Any) -> None:
        now = sum(source.data._version for source, _, _ in segments)
        if versions.setdefault(chunk.start, now) == now:
            index = chunk.start // self.known.chunk_size
            digest = self.known.digests[16 * index : 16 * index + 16].hex()
            chunk.home.notes.hashed.append(m.Hashed(chunk.home.part, chunk.start, chunk.size, digest, same=True))
        else:
            compare(self, chunk, segments)

    monkeypatch.setattr(known.Comparison, "_copy_changed", trusting)
    with pytest.raises(AssertionError):
        change_unseen(tmp_path, fused, False)


def test_what_is_told_is_held_against_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk that is told to be the same with a digest that the base has not: the save fails, and the next works."""
    state = training(model())
    with checkpointer(tmp_path) as ckpt:
        for number in (1, 2):
            ckpt.save(number, state).result(60)
        with monkeypatch.context() as lying:
            tell_the_writer(lying, lambda chunk: structs.replace(chunk, digest=32 * "0"))
            handle = ckpt.save(3, state)
            with pytest.raises(asyncckpt.StorageError):
                handle.result(60)
        assert ckpt.save(4, state).result(60) == "committed"
    assert asyncckpt.open(tmp_path).steps() == [1, 2, 4] and equals(tmp_path, 4, image(state["model"]))


@pytest.mark.parametrize("shares", [True, False])
def test_the_base_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shares: bool) -> None:
    """It was deleted after the save, or can't be shared: what was left out is read back from the files held open."""
    state = training(model())
    with checkpointer(tmp_path) as ckpt:
        for number in (1, 2, 3):
            step(state)
            ckpt.save(number, state).result(60)
        for path in tmp_path.glob("step-*"):
            if shares:
                shutil.rmtree(path)

        def refused(self: LocalStorage, source: str, key: str) -> None:
            raise asyncckpt.StorageError("no more links", errno=31)

        if not shares:
            monkeypatch.setattr(LocalStorage, "share", refused)
        for number in (4, 5):
            step(state)
            LEFT_OUT.clear()
            assert ckpt.save(number, state).result(60) == "committed"
            assert equals(tmp_path, number, image(state["model"]))
            assert LEFT_OUT or number == 5


def test_nothing_is_left_out_where_all_is_looked_at(tmp_path: Path) -> None:
    state = training(model())
    with checkpointer(tmp_path, check_finite=True) as ckpt:
        for number in range(1, 5):
            ckpt.save(number, state).result(60)
        with torch.no_grad():
            state["model"]["frozen"][0].weight[0] = float("nan")
        ckpt.save(5, state).result(60)
        assert not LEFT_OUT
    assert [r.finite for r in asyncckpt.open(tmp_path).records()] == [True] * 4 + [False]


class Odd(nn.Module):
    """Tensors of all sizes, one that is not contiguous, two that are one, and one of no item."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [1, 7, 64, 500, CHUNK // 4, CHUNK // 4 + 3, 3 * CHUNK // 4, 2 * CHUNK]
        for i, size in enumerate(sizes):
            self.register_buffer(f"b{i}", torch.randn(size))
        self.register_buffer("turned", torch.randn(CHUNK // 64, 32).t())
        self.register_buffer("twin", self.b4)
        self.register_buffer("bf16", torch.randn(3 * CHUNK // 2).bfloat16())
        self.register_buffer("none", torch.empty(0, 3))


@pytest.mark.parametrize("seed", range(8))
def test_a_random_life_comes_back_bit_for_bit(tmp_path: Path, seed: int) -> None:
    """Changes of any tensor and none, to and fro; saves in flight together, parts left out, steps deleted."""
    coin = random.Random(seed)
    torch.manual_seed(seed)
    odd, owned = Odd(), nn.Linear(CHUNK // 4, 5)
    optimizer = torch.optim.SGD(owned.parameters(), 0.1)
    state = {"model": odd, "owned": owned, "optimizer": optimizer}
    before = {name: t.clone() for name, t in odd.state_dict().items()}
    saved: dict[int, dict[str, dict[str, torch.Tensor]]] = {}
    options: dict[str, Any] = {
        "codec": coin.choice(["incremental", "zstd", "delta"]),
        "overlap": coin.choice([False, True, "auto"]),
        "max_in_flight": coin.choice([1, 2, 3]),
        "keep": coin.choice([None, asyncckpt.Keep(last=2)]),
    }
    with checkpointer(tmp_path, **options) as ckpt:
        for number in range(1, 25):
            for name, buffer in odd.named_buffers():
                if buffer.numel() and coin.random() < 0.15:
                    buffer.data[coin.randrange(len(buffer))] = coin.random()
                elif coin.random() < 0.1 and buffer.shape == before[name].shape:
                    buffer.data.copy_(before[name])
            if coin.random() < 0.1:
                odd.register_buffer("b2", torch.randn(coin.choice([64, 64, 100])))
            chosen = coin.choice([["model", "owned", "optimizer"], ["model", "owned"], ["model"], ["owned"]])
            handle = ckpt.save(number, state, parts=chosen)
            saved[number] = {name: image(state[name]) for name in ("model", "owned") if name in chosen}
            if coin.random() < 0.3:
                owned(torch.randn(2, CHUNK // 4)).sum().backward()
                optimizer.step()
            if coin.random() < 0.6:
                assert handle.result(60) == "committed"
                if coin.random() < 0.15:
                    shutil.rmtree(tmp_path / f"step-{number:08d}")
        ckpt.wait_until_flushed()
    there = asyncckpt.open(tmp_path).steps()
    assert there and LEFT_OUT
    for number in there:
        for part, tensors in saved[number].items():
            assert equals(tmp_path, number, tensors, part), (number, part)


@pytest.mark.parametrize("overlap", [False, True])
def test_with_a_writer_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlap: Any) -> None:
    """Chunks of 8 MiB, through the socket; the writer is killed meanwhile, and the next one knows of nothing."""
    chunks.make_small(monkeypatch, 8 << 20)
    net = model(1024, 12)
    state = training(net)
    with checkpointer(tmp_path, writer="process", overlap=overlap) as ckpt:
        for number in range(1, 8):
            state["model"]["head"].weight.data += 1
            if number == 5:
                writer = ckpt.stats().writer_pid
                assert writer is not None
                os.kill(writer, signal.SIGKILL)
            LEFT_OUT.clear()
            handle = ckpt.save(number, state)
            try:
                handle.result(60)
            except asyncckpt.StorageError:
                assert number == 5, "only the save that the killed writer may have had"
            else:
                assert equals(tmp_path, number, image(net))
            assert bool(LEFT_OUT) == (number in (3, 4)) or number >= 5
        for number in (8, 9):
            assert ckpt.save(number, state).result(60) == "committed" and LEFT_OUT
