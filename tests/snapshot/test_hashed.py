"""Chunks that the trainer hashes: by the bytes that are written, whatever happens to the state meanwhile."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from msgspec import structs
from support import chunks
from support.torch_states import difference
from torch import nn

import asyncckpt
from asyncckpt.format import names
from asyncckpt.snapshot.copy import CopyJob
from asyncckpt.snapshot.hashed import Chunk
from asyncckpt.snapshot.snapshotter import Snapshotter
from asyncckpt.write import messages as m
from asyncckpt.write.pipeline import Attempt

CHUNK = 1 << 16


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> list[m.Hashed]:
    """Small chunks, for a writer in this process; what it is told of them."""
    chunks.make_small(monkeypatch, CHUNK)
    heard = list[m.Hashed]()
    tell_the_writer(monkeypatch, lambda hashed: heard.extend(hashed) or hashed)
    return heard


def tell_the_writer(monkeypatch: pytest.MonkeyPatch, change: Callable[[list[m.Hashed]], list[m.Hashed]]) -> None:
    take = Snapshotter.take

    def spying(self: Snapshotter, what: Any, arena: Any, overlap: bool, staged: Any, *rest: Any) -> Any:
        return take(self, what, arena, overlap, lambda upto, hashed: staged(upto, change(hashed)), *rest)

    monkeypatch.setattr(Snapshotter, "take", spying)


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
                assert len(places) == sum(-(-len(data) // CHUNK) for data in images.values())
            assert ckpt.verify(step) == step
    back = {part: dict.fromkeys(value, 0) for part, value in state.items()}
    assert asyncckpt.restore(tmp_path, back) == 3 and difference(back, state) is None


@pytest.mark.parametrize("overlap", [False, True])
def test_of_a_training(tmp_path: Path, told: list[m.Hashed], overlap: bool) -> None:
    """Parameters behind the fence and buffers before it, and an export that is cast."""
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
    assert {chunk.part for chunk in told} >= {"model", "model-bf16", "optimizer"}
    assert not any(chunk.same for chunk in told)


def test_what_is_told_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong digest is told: what is read back is not that, and nobody gets it."""
    tell_the_writer(monkeypatch, lambda hashed: [structs.replace(chunk, digest="0" * 32) for chunk in hashed])
    with asyncckpt.Checkpointer(tmp_path, writer="thread") as ckpt:
        ckpt.save(1, {"state": {"t": torch.randn(1 << 16)}}).result(60)
        with pytest.raises(asyncckpt.CorruptCheckpointError, match="is not what was committed"):
            ckpt.verify(1)


def test_chunks_of_another_size_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tell_the_writer(monkeypatch, lambda hashed: [structs.replace(chunk, size=chunk.size - 1) for chunk in hashed])
    with asyncckpt.Checkpointer(tmp_path, writer="thread", on_error="warn") as ckpt:
        handle = ckpt.save(1, {"state": {"t": torch.randn(1 << 16)}})
        with pytest.raises(asyncckpt.StorageError, match="hashed as one of"):
            handle.result(60)
        assert ckpt.steps() == []


def test_what_changes_while_it_is_copied_is_one_checkpoint_still(tmp_path: Path) -> None:
    """Its values are of several moments, which nobody can help; but it is never one that can't be read."""
    changing = torch.zeros(1 << 20)
    over = threading.Event()

    def change() -> None:
        while not over.is_set():
            changing.add_(1)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        with asyncckpt.Checkpointer(tmp_path, writer="thread", keep=asyncckpt.Keep(last=20)) as ckpt:
            for step in range(1, 11):
                ckpt.save(step, {"state": {"t": changing}})
            ckpt.wait_until_flushed()
            assert [ckpt.verify(step) for step in ckpt.steps()] == list(range(1, 11))
    finally:
        over.set()
        thread.join()


def test_a_planted_hash_of_what_was_there_before_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashed, then changed, then copied: what a digest of the source in place of the arena would be."""
    changing = torch.zeros(1 << 16)
    copy = Chunk.copy

    def hash_first(self: Chunk) -> None:
        copy(self)
        changing.add_(1)
        for piece in self.pieces:
            piece.copy()

    monkeypatch.setattr(Chunk, "copy", hash_first)
    with asyncckpt.Checkpointer(tmp_path, writer="thread") as ckpt:
        ckpt.save(1, {"state": {"t": changing}}).result(60)
        with pytest.raises(asyncckpt.CorruptCheckpointError):
            ckpt.verify(1)


@pytest.mark.parametrize("codec", ["raw", "incremental"])
def test_what_an_interrupted_save_still_copies_never_meets_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: Any
) -> None:
    """A signal's handler raises in `save` while a helper is in the middle of a chunk; the next save has its arena."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    main, first, take, hop = threading.main_thread(), Chunk.copy, CopyJob._take, Attempt._hop
    held, go_on, left = threading.Event(), threading.Event(), threading.Event()
    interrupting = False

    def slow(self: Chunk) -> None:
        if interrupting and threading.current_thread() is not main:
            held.set()
            go_on.wait(1.0)  # the longest that it can be waited for
            first(self)
            left.set()
        else:
            first(self)

    def interrupted(self: CopyJob) -> int | None:
        if interrupting and threading.current_thread() is main:
            assert held.wait(30)
            raise KeyboardInterrupt
        return take(self)

    def write(self: Attempt, *args: Any) -> None:
        assert not held.is_set() or left.wait(30)
        hop(self, *args)

    monkeypatch.setattr(Chunk, "copy", slow)
    monkeypatch.setattr(CopyJob, "_take", interrupted)
    monkeypatch.setattr(Attempt, "_hop", write)
    tensor = torch.zeros(1 << 16)
    try:
        with asyncckpt.Checkpointer(tmp_path, writer="thread", codec=codec, max_in_flight=1, on_error="warn") as ckpt:
            state = {"state": {"t": tensor}}
            ckpt.save(1, state).result(60)
            tensor.add_(1)
            interrupting = True
            with pytest.raises(KeyboardInterrupt):
                ckpt.save(2, state)
            interrupting = False
            saved = tensor.add_(1).clone()
            handle = ckpt.save(3, state)
            tensor.add_(1)
            go_on.set()
            assert handle.result(60) == "committed" and ckpt.verify(3) == 3
            back = {"state": {"t": torch.zeros(1 << 16)}}
            asyncckpt.restore(tmp_path, back, step=3)
            assert torch.equal(back["state"]["t"], saved)
    finally:
        torch.set_num_threads(before)
