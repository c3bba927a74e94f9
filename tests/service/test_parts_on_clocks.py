"""Parts on clocks of their own, from `maybe_save` to a resume: whole, with notices to leave, failures and retention."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import train_step, training
from support.processes import until
from support.torch_states import copies_held, difference, frozen, run

import asyncckpt
from asyncckpt import Auto, Every, Keep, Preemption

CLOCKS = {"model": Every(steps=2), "optimizer": Every(steps=6)}


def parts_by_step(directory: Path) -> dict[int, str]:
    """The first letters of the parts of each checkpoint."""
    return {r.step: "".join(part[0] for part in r.parts) for r in asyncckpt.open(directory).records()}


@pytest.mark.parametrize("codec", ["raw", "delta"])
def test_a_training_saves_each_part_by_its_clock_and_goes_on_from_any_of_them(tmp_path: Path, codec: Any) -> None:
    state = training(width=8)
    there: dict[int, Any] = {}
    with run(tmp_path, parts=CLOCKS, codec=codec) as ckpt:
        for step in range(1, 15):
            train_step(state)
            assert ckpt.should_save(step) == (step % 2 == 0)
            handle = ckpt.maybe_save(step, state)
            assert (handle is not None) == (step % 2 == 0)
            there[step] = frozen(state)
            if handle is not None:
                assert handle.omitted == (() if step in (2, 6, 12) else ("optimizer",))
                handle.result(30)
    assert parts_by_step(tmp_path) == {2: "mor", 4: "mr", 6: "mor", 8: "mr", 10: "mr", 12: "mor", 14: "mr"}

    other = training(width=8, seed=1)
    assert asyncckpt.restore(tmp_path, other) == 12
    assert difference(frozen(other), there[12]) is None
    assert asyncckpt.restore(tmp_path, other, allow_stale={"optimizer"}) == 14
    assert difference(frozen(other), there[14] | {"optimizer": there[12]["optimizer"]}) is None


def test_after_a_restore_the_clocks_go_on(tmp_path: Path) -> None:
    state = training(width=8)
    with run(tmp_path, parts=CLOCKS) as ckpt:
        for step in range(1, 9):
            ckpt.maybe_save(step, state)
    with run(tmp_path, parts=CLOCKS) as ckpt:
        assert ckpt.restore(state) == 6
        for step in range(7, 13):
            ckpt.maybe_save(step, state)
    assert parts_by_step(tmp_path) == {2: "mor", 4: "mr", 6: "mor", 8: "mr", 10: "mr", 12: "mor"}
    with run(tmp_path, parts=CLOCKS) as ckpt:
        assert ckpt.restore(state, allow_stale=["optimizer"]) == 12
        assert ckpt.restore(state, 10, allow_stale=["optimizer"], rewind=True) == 10
        ckpt.maybe_save(12, state)
    assert parts_by_step(tmp_path)[12] == "mor"


def test_parts_without_a_clock_go_by_the_cadence(tmp_path: Path) -> None:
    state = {name: {"of": name} for name in ("model", "rng")}
    with run(tmp_path, parts={"model": Every(steps=2)}, cadence=Every(steps=6)) as ckpt:
        for step in range(1, 13):
            ckpt.maybe_save(step, state)
    assert parts_by_step(tmp_path) == {2: "mr", 4: "m", 6: "mr", 8: "m", 10: "m", 12: "mr"}


def test_a_save_of_the_users_own_is_complete(tmp_path: Path) -> None:
    state = training(width=8)
    with run(tmp_path, parts=CLOCKS) as ckpt:
        ckpt.maybe_save(2, state)
        ckpt.save(3, state)
        ckpt.maybe_save(4, state)
        ckpt.maybe_save(6, state, parts=["rng"])
    assert parts_by_step(tmp_path) == {2: "mor", 3: "mor", 4: "mr", 6: "r"}


@pytest.mark.parametrize("already", [True, False])
def test_what_is_saved_on_a_notice_is_complete(tmp_path: Path, already: bool) -> None:
    """Also where the very step has been saved, in parts."""
    state = training(width=8)
    with run(tmp_path, parts=CLOCKS, preempt=Preemption(signals=(signal.SIGUSR1,))) as ckpt:
        ckpt.maybe_save(2, state)
        if already:
            ckpt.maybe_save(4, state)
        os.kill(os.getpid(), signal.SIGUSR1)
        until(lambda: ckpt.should_save(5))
        handle = ckpt.maybe_save(4, state)
        assert handle is not None and handle.omitted == () and ckpt.preempted
        assert handle.result(30) == "committed"
        assert ckpt.maybe_save(5, state) is None
    assert parts_by_step(tmp_path) == {2: "mor", 4: "mor"}


def test_a_save_of_some_parts_is_no_answer_to_a_notice(tmp_path: Path) -> None:
    state = training(width=8)
    with run(tmp_path, parts=CLOCKS, preempt=Preemption(signals=(signal.SIGUSR1,))) as ckpt:
        ckpt.maybe_save(2, state)
        os.kill(os.getpid(), signal.SIGUSR1)
        until(lambda: ckpt.should_save(3))
        ckpt.save(3, state, parts=["model"])
        assert not ckpt.preempted
        assert ckpt.maybe_save(4, state) is not None and ckpt.preempted
    assert parts_by_step(tmp_path) == {2: "mor", 3: "m", 4: "mor"}


def test_a_part_whose_save_failed_goes_with_the_next(tmp_path: Path) -> None:
    state = training(width=8)
    with run(tmp_path, parts=CLOCKS, overlap=True, on_error="warn") as ckpt:
        for step in range(1, 6):
            ckpt.maybe_save(step, state)
        ckpt.wait_until_flushed()
        blocked = tmp_path / "step-00000006"
        blocked.write_text("a file where a folder is to be")
        handle = ckpt.maybe_save(6, state)
        assert handle is not None
        with pytest.raises(asyncckpt.StorageError):
            handle.result(30)
        blocked.unlink()
        for step in range(7, 11):
            ckpt.maybe_save(step, state)
    assert parts_by_step(tmp_path) == {2: "mor", 4: "mr", 8: "mor", 10: "mr"}


def test_a_part_that_was_skipped_goes_with_the_next(tmp_path: Path) -> None:
    state = training(width=8)
    with run(tmp_path, parts=CLOCKS, max_in_flight=1, when_full="skip", overlap=True) as ckpt:
        ckpt.maybe_save(2, state)
        ckpt.wait_until_flushed()
        with copies_held(ckpt):
            ckpt.maybe_save(4, state)
            skipped = ckpt.maybe_save(6, state)
            assert skipped is not None and skipped.outcome == "skipped"
        for step in (8, 10):
            ckpt.wait_until_flushed()
            ckpt.maybe_save(step, state)
    assert parts_by_step(tmp_path) == {2: "mor", 4: "mr", 8: "mor", 10: "mr"}


@pytest.mark.parametrize(("keep", "most"), [(Keep(last=1), 4), (Keep(last=2, every=20), 12)])
def test_retention_leaves_what_the_newest_needs_of_older_ones(tmp_path: Path, keep: Keep, most: int) -> None:
    """Three clocks, so that the newest needs one that is neither complete nor the newest of its kind."""
    state = {name: torch.zeros(2) for name in ("model", "ema", "optimizer")}
    clocks = {"model": Every(steps=1), "ema": Every(steps=4), "optimizer": Every(steps=16)}
    with run(tmp_path, parts=clocks, keep=keep) as ckpt:
        for step in range(1, 60):
            for value in state.values():
                value.fill_(step)
            handle = ckpt.maybe_save(step, state)
            assert handle is not None
            handle.result(30)
            if step % 3 == 0:
                other = {name: torch.zeros(2) for name in state}
                assert asyncckpt.restore(tmp_path, other, allow_stale=["ema", "optimizer"]) == step
                expected = {"model": step, "ema": step - step % 4 or 1, "optimizer": step - step % 16 or 1}
                assert {name: int(value[0]) for name, value in other.items()} == expected
    steps = asyncckpt.open(tmp_path).steps()
    assert {48, 56, 59} <= set(steps) and len(steps) <= most


@pytest.mark.parametrize(
    ("parts", "error"),
    [
        ({"model": 100}, TypeError),
        ({"model": Every}, TypeError),
        ({"model": Auto()}, TypeError),
        (["model"], TypeError),
    ],
)
def test_clocks_that_make_no_sense_are_refused_at_once(tmp_path: Path, parts: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="parts="):
        run(tmp_path, parts=parts)


def test_a_clock_of_a_part_that_is_not_there_is_told_of_at_the_first_step(tmp_path: Path) -> None:
    with run(tmp_path, parts={"modle": Every(steps=100)}) as ckpt, pytest.raises(ValueError, match="names modle"):
        ckpt.maybe_save(1, {"model": {}})
