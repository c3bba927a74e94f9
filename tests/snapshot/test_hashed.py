"""Chunks that the trainer hashes: by the bytes that are written, whatever happens to the state meanwhile."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from torch import nn

import asyncckpt
from asyncckpt.format import names
from asyncckpt.snapshot import snapshotter
from asyncckpt.snapshot.hashed import Chunk
from asyncckpt.snapshot.snapshotter import Snapshotter
from asyncckpt.write import messages as m
from asyncckpt.write import pipeline
from tests.support.torch_states import difference

CHUNK = 1 << 16


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> list[m.Hashed]:
    """Small chunks, for a writer in this process; what it is told of them."""
    monkeypatch.setattr(pipeline, "CHUNK_SIZE", CHUNK)
    monkeypatch.setattr(snapshotter, "CHUNK_SIZE", CHUNK)
    take, heard = Snapshotter.take, list[m.Hashed]()

    def spying(self: Snapshotter, what: Any, arena: Any, overlap: bool, staged: Any, *rest: Any) -> Any:
        def hear(upto: int, hashed: list[m.Hashed]) -> None:
            heard.extend(hashed)
            staged(upto, hashed)

        return take(self, what, arena, overlap, hear, *rest)

    monkeypatch.setattr(Snapshotter, "take", spying)
    return heard


def tensors(rng: random.Random, strided: bool) -> dict[str, torch.Tensor]:
    """Small ones, and ones that go over the ends of chunks, of dtypes of several widths."""
    found: dict[str, torch.Tensor] = {}
    for i in range(rng.randrange(1, 120)):
        size = rng.choice([1, 3, 17, 500, 20_000, 100_000])
        dtype = rng.choice([torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool])
        found[f"t{i}"] = torch.randint(0, 2, (size,)).to(dtype)
        if strided and rng.random() < 0.3:
            found[f"t{i}"] = found[f"t{i}"][::2]
    return found


def image(root: Path, step: int, part: str) -> bytes:
    (path,) = (root / names.step_name(step)).glob(f"*/{part}.safetensors")
    return path.read_bytes()


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_digests_are_those_of_the_bytes_written(tmp_path: Path, told: list[m.Hashed], seed: int, strided: bool) -> None:
    """Of every chunk that is contiguous in CPU memory, and of none twice."""
    rng = random.Random(seed)
    state = {"one": tensors(rng, strided), "two": tensors(rng, strided), "none": {"n": 1}}
    with asyncckpt.Checkpointer(tmp_path, writer="thread") as ckpt:
        for step in (1, 2, 3):
            told.clear()
            ckpt.save(step, state).result(60)
            images = {part: image(tmp_path, step, part) for part in ("one", "two")}
            for chunk in told:
                data = images[chunk.part][chunk.start : chunk.start + chunk.size]
                assert len(data) == chunk.size and xxhash.xxh3_128_hexdigest(data) == chunk.digest
            places = [(chunk.part, chunk.start) for chunk in told]
            assert len(places) == len(set(places))
            if not strided:
                assert len(places) >= sum((len(data) - 1) // CHUNK for data in images.values())
            assert ckpt.verify(step) == step
    back = {part: dict.fromkeys(value, 0) for part, value in state.items()}
    assert asyncckpt.restore(tmp_path, back) == 3 and difference(back, state) is None


@pytest.mark.parametrize("overlap", [False, True])
def test_of_a_training(tmp_path: Path, told: list[m.Hashed], overlap: bool) -> None:
    """Parameters behind the fence and buffers before it, an export that is cast, and a second arena."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 300), nn.BatchNorm1d(300), nn.Linear(300, 300))
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"model": model, "optimizer": optimizer}
    with asyncckpt.Checkpointer(tmp_path, writer="thread", overlap=overlap, export={"model": "bf16"}) as ckpt:
        for step in range(1, 6):
            optimizer.zero_grad()
            model(torch.randn(8, 300)).square().mean().backward()
            optimizer.step()
            ckpt.save(step, state)
        ckpt.wait_until_flushed()
        assert [ckpt.verify(step) for step in ckpt.steps()] == [1, 2, 3, 4, 5]
    assert {chunk.part for chunk in told} >= {"model", "optimizer"}
    assert not any(chunk.same for chunk in told)


def save_beside_a_writer(root: Path) -> None:
    """Save what another thread never stops to change, then verify all."""
    changing = torch.zeros(1 << 20)
    over = threading.Event()

    def change() -> None:
        while not over.is_set():
            changing.add_(1)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        with asyncckpt.Checkpointer(root, writer="thread", keep=asyncckpt.Keep(last=20)) as ckpt:
            for step in range(1, 11):
                ckpt.save(step, {"state": {"t": changing}})
            ckpt.wait_until_flushed()
            for step in ckpt.steps():
                ckpt.verify(step)
    finally:
        over.set()
        thread.join()


def test_what_changes_while_it_is_copied_is_one_checkpoint_still(tmp_path: Path) -> None:
    """Its values are of several moments, which nobody can help; but it is never one that can't be read."""
    save_beside_a_writer(tmp_path)


def test_a_planted_hash_of_what_is_copied_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest of the source, taken before the copy, in place of that of the arena."""

    def copy(self: Chunk) -> None:
        for piece in self.pieces:
            piece.copy()
        before = xxhash.xxh3_128_hexdigest(
            self.header + b"".join(self.memory[p.offset : p.offset + p.size] for p in self.pieces)
        )
        for piece in self.pieces:
            piece.copy()
        self.tell(m.Hashed(self.part, self.start, self.size, before))

    monkeypatch.setattr(Chunk, "copy", copy)
    with pytest.raises(asyncckpt.CorruptCheckpointError):
        save_beside_a_writer(tmp_path)
