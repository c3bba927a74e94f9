"""Checkpoints that lack parts: what a restore takes, what it passes over, and where stale parts come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.torch_states import damage, run

import asyncckpt
from asyncckpt.errors import CheckpointNotFoundError, CorruptCheckpointError, StateMismatchError
from asyncckpt.format import names

PARTS = ("model", "ema", "optimizer")


def state_of(step: int) -> dict[str, Any]:
    """A state whose every part tells of its step."""
    return {part: torch.full((3,), float(step)) for part in PARTS}


def save(ckpt: asyncckpt.Checkpointer, step: int, *omitted: str, number: int | None = None, **options: Any) -> None:
    state = state_of(step if number is None else number)
    ckpt.save(step, state, parts=[part for part in PARTS if part not in omitted], **options).result(30)


def restored(directory: Path, step: int | None = None, **options: Any) -> tuple[int | None, dict[str, int]]:
    """The step, and what each part holds afterwards."""
    state = state_of(-1)
    found = asyncckpt.restore(directory, state, step, **options)
    return found, {part: int(value[0]) for part, value in state.items()}


def all_of(step: int, **others: int) -> dict[str, int]:
    return dict.fromkeys(PARTS, step) | others


def test_a_restore_takes_the_newest_complete_one_without_a_word(tmp_path: Path) -> None:
    with run(tmp_path) as ckpt:
        save(ckpt, 1)
        save(ckpt, 2)
        save(ckpt, 3, "optimizer")
        save(ckpt, 4, "optimizer", "ema")
    assert restored(tmp_path) == (2, all_of(2))  # a warning would be an error here


def test_stale_parts_come_from_the_newest_older_checkpoint_that_has_them(tmp_path: Path) -> None:
    with run(tmp_path) as ckpt:
        save(ckpt, 1)
        save(ckpt, 2, "model", "ema")
        save(ckpt, 3, "optimizer")
        save(ckpt, 4, "optimizer", "ema")
    assert restored(tmp_path, allow_stale={"optimizer", "ema"}) == (4, all_of(4, optimizer=2, ema=3))
    assert restored(tmp_path, allow_stale="optimizer") == (3, all_of(3, optimizer=2))
    assert restored(tmp_path, allow_stale=["ema"]) == (1, all_of(1))
    assert restored(tmp_path, 3, allow_stale=["optimizer"]) == (3, all_of(3, optimizer=2))
    assert restored(tmp_path, 1, allow_stale=PARTS) == (1, all_of(1))


def test_some_parts_come_from_the_newest_that_has_them(tmp_path: Path) -> None:
    with run(tmp_path) as ckpt:
        save(ckpt, 1)
        save(ckpt, 2, "ema")
        save(ckpt, 3, "optimizer", "ema")
    assert restored(tmp_path, parts=["model"]) == (3, all_of(-1, model=3))
    assert restored(tmp_path, parts=["model", "optimizer"]) == (2, all_of(-1, model=2, optimizer=2))
    assert restored(tmp_path, parts=["model", "ema"], allow_stale=["ema"]) == (3, all_of(-1, model=3, ema=1))
    assert list(asyncckpt.load(tmp_path, parts=["optimizer"])) == ["optimizer"]
    assert int(asyncckpt.load(tmp_path, parts=["optimizer"])["optimizer"][0]) == 2
    assert int(asyncckpt.load(tmp_path, parts="ema")["ema"][0]) == 1
    assert list(asyncckpt.load(tmp_path)) == ["model"], "without parts=, whatever the newest has"


def test_without_strict_only_what_the_state_has_must_be_there(tmp_path: Path) -> None:
    with run(tmp_path) as ckpt:
        save(ckpt, 1)
        save(ckpt, 2, "optimizer")
    state = {"model": torch.zeros(3)}
    assert asyncckpt.restore(tmp_path, state, strict=False) == 2
    assert restored(tmp_path, strict=False) == (1, all_of(1))


@pytest.mark.parametrize("explicit", [True, False])
def test_what_was_saved_after_going_back_is_not_mixed_into_what_was_there_before(
    tmp_path: Path, explicit: bool
) -> None:
    """Step 5 of the first branch lacks what step 4 of the second one has: never may these two be put together."""
    with run(tmp_path) as ckpt:
        save(ckpt, 1)
        save(ckpt, 3)
        save(ckpt, 5, "optimizer")
        ckpt.restore(state_of(0), 1)
        save(ckpt, 4, number=40)
    step = 5 if explicit else None
    assert restored(tmp_path, step, allow_stale=["optimizer"]) == (5, all_of(5, optimizer=3))
    assert restored(tmp_path) == (4, all_of(40))


def test_a_branch_that_was_left_gives_nothing_to_the_one_that_is_trained(tmp_path: Path) -> None:
    with run(tmp_path) as ckpt:
        save(ckpt, 1)
        save(ckpt, 3)
        save(ckpt, 4, "optimizer")
        ckpt.restore(state_of(0), 1, rewind=True)
        save(ckpt, 5, "optimizer")
    assert restored(tmp_path, allow_stale=["optimizer"]) == (5, all_of(5, optimizer=1))
    assert restored(tmp_path, 4, allow_stale=["optimizer"]) == (4, all_of(4, optimizer=3)), "as it was there and then"


def test_a_resume_frees_the_steps_that_it_passed_over(tmp_path: Path) -> None:
    with run(tmp_path) as ckpt:
        save(ckpt, 1)
        save(ckpt, 2, "optimizer")
        save(ckpt, 3, "optimizer")
    with run(tmp_path) as ckpt:
        assert ckpt.restore(state_of(0), parts=["model"]) == 3
        with pytest.raises(asyncckpt.CheckpointExistsError):
            save(ckpt, 2)
        assert ckpt.restore(state_of(0)) == 1
        with pytest.raises(asyncckpt.CheckpointExistsError):
            save(ckpt, 1)
        ckpt.pin(3)
        save(ckpt, 2, number=20)
        with pytest.raises(asyncckpt.CheckpointExistsError):
            save(ckpt, 2)
        with pytest.raises(asyncckpt.CheckpointExistsError, match="pinned"):
            save(ckpt, 3)
        ckpt.unpin(3)
        save(ckpt, 3, "optimizer", number=30)
    assert restored(tmp_path, allow_stale=["optimizer"]) == (3, all_of(30, optimizer=20))


def test_a_damaged_source_damages_what_needs_it(tmp_path: Path) -> None:
    with run(tmp_path) as ckpt:
        for step in (1, 2):
            save(ckpt, step)
        save(ckpt, 3, "optimizer")
    damage(tmp_path, 2, "optimizer")
    with pytest.warns(UserWarning, match=r"passed over step 3 .*step 2, part 'optimizer'.*; step 2 "):
        assert restored(tmp_path, allow_stale=["optimizer"]) == (1, all_of(1))
    with pytest.raises(CorruptCheckpointError, match="step 2, part 'optimizer'"):
        restored(tmp_path, 3, allow_stale=["optimizer"])


def test_a_source_whose_manifest_is_damaged_is_not_replaced_by_an_older_one(tmp_path: Path) -> None:
    with run(tmp_path) as ckpt:
        for step in (1, 2):
            save(ckpt, step)
        save(ckpt, 3, "optimizer")
    manifest = tmp_path / names.step_name(2) / names.MANIFEST
    manifest.write_bytes(manifest.read_bytes()[:-9])
    with pytest.warns(UserWarning, match="passed over step 3 .*may be that of step 2"):
        assert restored(tmp_path, allow_stale=["optimizer"]) == (1, all_of(1))


def test_nothing_starts_silently_anew_where_only_parts_are_there(tmp_path: Path) -> None:
    assert restored(tmp_path, allow_stale=["optimizer"]) == (None, all_of(-1))
    with run(tmp_path) as ckpt:
        save(ckpt, 1, "optimizer")
        save(ckpt, 2, "optimizer", "ema")
        for options in ({}, {"allow_stale": ["optimizer"]}, {"allow_stale": ["ema", "optimizer"]}):
            state = state_of(-1)
            with pytest.raises(
                CheckpointNotFoundError, match=r"whole state.*step 2, has model, and lacks ema, optimizer"
            ):
                ckpt.restore(state, **options)
            assert int(state["model"][0]) == -1
    with pytest.raises(CheckpointNotFoundError, match="has optimizer; the newest, step 2, has model"):
        asyncckpt.load(tmp_path, parts=["optimizer"])
    with pytest.raises(CheckpointNotFoundError, match="no older checkpoint"):
        restored(tmp_path, 1, allow_stale=["optimizer"])
    with pytest.raises(StateMismatchError, match=r"allow_stale=\['optimizer'\]"):
        restored(tmp_path, 1)


def test_parts_that_the_state_does_not_have_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StateMismatchError, match="allow_stale= names optimiser"):
        restored(tmp_path, allow_stale=["optimiser"])
