"""Bringing a state back: in place, verified before anything is touched, or a clear error and nothing changed."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from support.models import same, train_step, training, weights
from support.processes import PATIENCE

import asyncckpt


@pytest.fixture
def run(tmp_path):
    """Three committed steps in a folder, and the weights of each."""
    state = training()
    saved = {}
    with asyncckpt.Checkpointer(tmp_path / "run", writer="thread") as ckpt:
        for step in (1, 2, 3):
            train_step(state)
            saved[step] = weights(state)
            ckpt.save(step, state, metrics={"loss": step / 2})
    return tmp_path / "run", saved


@pytest.fixture
def ckpt(run):
    with asyncckpt.Checkpointer(run[0], writer="thread") as ckpt:
        yield ckpt


def damage(run, step, file="model.safetensors"):
    path = asyncckpt.open(run).path(step) / file
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)


def snapshot_of(state):
    optimizer = state["optimizer"].state_dict()["state"]
    return weights(state) + [t.clone() for entry in optimizer.values() for t in entry.values()]


def test_nothing_committed_is_none_and_changes_nothing(tmp_path):
    state = training()
    before = snapshot_of(state)
    with asyncckpt.Checkpointer(tmp_path / "run", writer="thread") as ckpt:
        assert ckpt.restore(state) is None
    assert asyncckpt.restore(tmp_path / "absent", state) is None
    assert same(snapshot_of(state), before)
    with pytest.raises(asyncckpt.CheckpointNotFoundError):
        asyncckpt.load(tmp_path / "absent")


@pytest.mark.parametrize("step", [None, 1, 3])
def test_the_newest_or_the_one_asked_for_in_place(run, ckpt, step):
    state = training(seed=7)
    places = [p.data_ptr() for p in state["model"].parameters()]
    assert ckpt.restore(state, step) == (step or 3)
    assert same(weights(state), run[1][step or 3])
    assert [p.data_ptr() for p in state["model"].parameters()] == places


def test_in_a_new_process_bit_for_bit(run):
    code = (
        "import sys, torch, asyncckpt; sys.path.insert(0, sys.argv[2]); from support.models import *\n"
        "state = training(seed=9); asyncckpt.restore(sys.argv[1], state)\n"
        "train_step(state); torch.save(weights(state), sys.argv[1] + '/../after.pt')"
    )
    tests = os.path.dirname(os.path.dirname(__file__))
    subprocess.run([sys.executable, "-c", code, str(run[0]), tests], check=True, timeout=PATIENCE)
    state = training(seed=11)
    asyncckpt.restore(run[0], state)
    train_step(state)  # draws from the restored generators
    assert same(weights(state), torch.load(run[0] / ".." / "after.pt"))


def test_an_interrupted_training_ends_like_an_undisturbed_one(tmp_path):
    def build():
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.BatchNorm1d(32), torch.nn.Dropout(0.3),
                                    torch.nn.Linear(32, 1))  # fmt: skip
        optimizer = torch.optim.AdamW(model.parameters())
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=20)
        return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "rng": asyncckpt.RngState()}

    def step(state):
        state["model"](torch.randn(8, 16)).square().mean().backward()
        state["optimizer"].step()
        state["scheduler"].step()
        state["optimizer"].zero_grad()

    undisturbed = build()
    for _ in range(12):
        step(undisturbed)
    for at in range(1, 12):
        first, second = build(), build()
        with asyncckpt.Checkpointer(tmp_path / str(at), writer="thread") as ckpt:
            for _ in range(at):
                step(first)
            ckpt.save(at, first)
        for _ in range(asyncckpt.restore(tmp_path / str(at), second), 12):
            step(second)
        assert same(snapshot_of(second), snapshot_of(undisturbed))
        assert all(torch.equal(a, b) for a, b in zip(
            second["model"].buffers(), undisturbed["model"].buffers(), strict=True))  # fmt: skip


# What does not fit


@pytest.mark.parametrize("how", ["missing", "unexpected", "misshaped"])
def test_keys_that_do_not_fit_are_named_and_nothing_is_changed(ckpt, how):
    state = training(seed=5)
    model = state["model"]
    if how == "missing":
        model.register_buffer("extra", torch.zeros(2))
        key = "model['extra']"
    elif how == "unexpected":
        del model[2]
        key = "model['2.weight']"
    else:
        model[1] = torch.nn.Linear(64, 32)
        key = "model['1.weight']"
    before = snapshot_of(state)
    with pytest.raises(asyncckpt.StateMismatchError, match="nothing was changed") as caught:
        ckpt.restore(state)
    assert any(key in found for found in getattr(caught.value, how))
    assert same(snapshot_of(state), before)


def test_not_strict_takes_what_both_sides_have(run, ckpt):
    state = training(seed=5)
    state["model"].register_buffer("extra", torch.full((2,), 7.0))
    state["more"] = {"x": 1}
    assert ckpt.restore(state, strict=False) == 3
    assert same(weights(state), run[1][3])
    assert state["model"].extra.tolist() == [7.0, 7.0]
    assert state["more"] == {"x": 1}
    wrong = training(width=32)
    with pytest.raises(asyncckpt.StateMismatchError):
        ckpt.restore(wrong, strict=False)


def test_parts_that_only_one_side_has_are_an_error_unless_told(run, ckpt):
    state = training(seed=5)
    model_only = {"model": state["model"]}
    with pytest.raises(asyncckpt.StateMismatchError, match="parts=") as caught:
        ckpt.restore(model_only)
    assert set(caught.value.unexpected) == {"optimizer", "rng"}
    assert ckpt.restore(model_only, parts=["model"]) == 3
    assert same(weights(state), run[1][3])
    with pytest.raises(asyncckpt.StateMismatchError) as caught:
        ckpt.restore({**state, "ema": {"x": 1}})
    assert caught.value.missing == ("ema",)
    with pytest.raises(asyncckpt.CheckpointNotFoundError, match="optimizer"):
        ckpt.restore({**state, "ema": {"x": 1}}, parts=["ema"])


@pytest.mark.parametrize(
    "rename", [{"_orig_mod.": "", "module.": ""}, lambda key: key.removeprefix("module.").removeprefix("_orig_mod.")]
)
def test_prefixes_of_wrappers_are_taken_off(tmp_path, rename):
    state = training()

    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.add_module("_orig_mod", module)

    with asyncckpt.Checkpointer(tmp_path / "run", writer="thread") as ckpt:
        ckpt.save(1, {"model": Wrapper(state["model"])}).result(PATIENCE)
        fresh = training(seed=4)["model"]
        with pytest.raises(asyncckpt.StateMismatchError):
            ckpt.restore({"model": fresh})
        ckpt.restore({"model": fresh}, rename=rename)
    assert same([*fresh.parameters()], weights(state))


def test_into_a_model_of_another_precision(run, ckpt):
    model = training(seed=4)["model"].to(torch.bfloat16)
    ckpt.restore({"model": model}, parts=["model"])
    assert all(torch.equal(p, w.to(torch.bfloat16)) for p, w in zip(model.parameters(), run[1][3], strict=True))


# Damage


def test_a_damaged_newest_is_passed_over_named_and_may_be_saved_again(run):
    folder, saved = run
    damage(folder, 3)
    state = training(seed=4)
    with asyncckpt.Checkpointer(folder, writer="thread") as ckpt:
        with pytest.warns(UserWarning, match="step 2 is used; passed over step 3") as caught:
            assert ckpt.restore(state) == 2
        assert "model.safetensors" in str(caught[0].message)
        assert same(weights(state), saved[2])
        with pytest.raises(asyncckpt.CorruptCheckpointError) as error:
            ckpt.restore(state, 3)
        assert (error.value.step, error.value.part) == (3, "model")
        assert same(weights(state), saved[2])
        with pytest.raises(asyncckpt.CheckpointExistsError):
            ckpt.save(2, state)
        assert ckpt.save(3, state).result(PATIENCE) == "committed"
        assert ckpt.verify() == 3


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json", "../manifest.json"])
def test_if_all_are_damaged_it_raises_and_never_starts_anew(run, file):
    folder, _ = run
    for step in (1, 2, 3):
        damage(folder, step, file)
    state = training(seed=4)
    before = snapshot_of(state)
    with asyncckpt.Checkpointer(folder, writer="thread") as ckpt:
        with pytest.raises(asyncckpt.CorruptCheckpointError, match="every checkpoint is damaged"):
            ckpt.restore(state)
        with pytest.raises(asyncckpt.CorruptCheckpointError):
            asyncckpt.load(folder)
    assert same(snapshot_of(state), before)


# Branches


def test_a_branch_that_was_left_is_never_resumed(run):
    folder, saved = run
    state = training(seed=4)
    with asyncckpt.Checkpointer(folder, writer="thread") as ckpt:
        assert ckpt.restore(state, 1, rewind=True) == 1
        assert ckpt.steps() == [1]
    with asyncckpt.Checkpointer(folder, writer="thread") as ckpt:  # the next start
        assert ckpt.restore(state) == 1
        assert same(weights(state), saved[1])
        train_step(state)
        assert ckpt.save(2, state).result(PATIENCE) == "committed"  # over the step 2 of the other branch
        new = weights(state)
        assert ckpt.steps() == [1, 2]
        train_step(state)
        assert ckpt.restore(state) == 2
        assert same(weights(state), new)


def test_a_step_that_is_committed_is_not_overwritten_unawares(run, ckpt):
    state = training(seed=4)
    with pytest.raises(asyncckpt.CheckpointExistsError, match="rewind"):
        ckpt.save(3, state)
    assert ckpt.save(3, state, overwrite=True).result(PATIENCE) == "committed"
    expected = weights(state)
    train_step(state)
    ckpt.restore(state)
    assert same(weights(state), expected)


# Without owning the run


def test_beside_a_live_training(run):
    folder, saved = run
    with asyncckpt.Checkpointer(folder) as ckpt:
        state = training(seed=4)
        assert asyncckpt.restore(folder, state) == 3
        assert same(weights(state), saved[3])
        other = asyncckpt.open(folder)
        assert (other.steps(), other.latest(), other.verify()) == ([1, 2, 3], 3, 3)
        ckpt.save(4, state).result(PATIENCE)
        assert other.latest() == 4
        ckpt.delete(4)
        assert other.latest() == 3
        with pytest.raises(asyncckpt.CheckpointNotFoundError):
            ckpt.delete(4)


def test_load_gives_values_parts_and_single_tensors(run):
    folder, saved = run
    whole = asyncckpt.load(folder, 2)
    assert set(whole) == {"model", "optimizer", "rng"}
    assert same([*whole["model"].values()], saved[2])
    some = asyncckpt.load(folder, 2, parts=["model"], keys=["1.bias", "0.weight"])
    assert torch.equal(some["model"]["1.bias"], whole["model"]["1.bias"])
    assert list(some["model"]) == ["1.bias", "0.weight"]
    for wrong in ({"step": 9}, {"parts": ["nothing"]}, {"parts": ["model"], "keys": ["nothing"]}):
        with pytest.raises(asyncckpt.CheckpointNotFoundError):
            asyncckpt.load(folder, **wrong)
    with pytest.raises(ValueError, match="one part"):
        asyncckpt.load(folder, keys=["1.bias"])


def test_files_open_in_the_reference_reader(run):
    folder, saved = run
    tensors = load_file(asyncckpt.open(folder).path(3) / "model.safetensors")
    assert same([tensors[f"{i}.{kind}"] for i in range(3) for kind in ("weight", "bias")], saved[3])


def test_restore_waits_for_what_is_in_flight(tmp_path):
    state = training()
    with asyncckpt.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, state)
        expected = weights(state)
        train_step(state)
        assert ckpt.restore(state) == 1
        assert same(weights(state), expected)
