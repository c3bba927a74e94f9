"""A change inside the copy's window that no fence sees: found, told once, never committed, copied early afterwards."""

import threading
import warnings

import numpy as np
import pytest
import torch
from support.torch_states import PATIENCE, bits, copies_held, difference, files, frozen, run
from torch import nn

import asyncckpt


def training(width=30):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Conv1d(2, 3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


def through_data(state):
    for p in state["model"].parameters():
        p.data.add_(1)


def one_tensor_through_data(state):
    state["model"][0].weight.data.mul_(2)


def vector_to_parameters(state):
    size = sum(p.numel() for p in state["model"].parameters())
    nn.utils.vector_to_parameters(torch.randn(size), state["model"].parameters())


def foreach_on_detached(state):
    torch._foreach_add_([p.detach() for p in state["model"].parameters()], 1.0)


def foreach_on_data(state):
    torch._foreach_mul_([p.data for p in state["model"].parameters()], 1.5)


def fused_kernel_by_hand(state):
    params = [p.data for p in state["model"].parameters()]
    with torch.no_grad():
        torch._fused_sgd_(
            params, [torch.ones_like(p) for p in params], [], weight_decay=0.0, momentum=0.0, lr=0.1, dampening=0.0,
            nesterov=False, maximize=False, is_first_step=True,
        )  # fmt: skip


def other_data(state):
    state["model"][0].weight.data = torch.randn_like(state["model"][0].weight)


def smaller_data(state):
    state["model"][0].weight.data = torch.randn(1)


def in_place(state):
    with torch.no_grad():
        state["model"][2].bias.clamp_(0, 0.1)


def by_numpy(state):
    state["model"][0].weight.detach().numpy()[...] += 1


def momentum(state):
    for entry in state["optimizer"].state.values():
        entry["momentum_buffer"].data.zero_()


def freed(state):
    state["model"][0].weight.untyped_storage().resize_(0)


MUTATIONS = {
    through_data: "model/0.weight", one_tensor_through_data: "model/0.weight", vector_to_parameters: "model/2.weight",
    foreach_on_detached: "model/0.weight", foreach_on_data: "model/1.weight", fused_kernel_by_hand: "model/0.weight",
    other_data: "model/0.weight", smaller_data: "model/0.weight", in_place: "model/2.bias", by_numpy: "model/0.weight",
    momentum: "optimizer/state.0.momentum_buffer", freed: "model/0.weight",
}  # fmt: skip


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("mutate", MUTATIONS)
def test_a_change_that_no_fence_sees(mutate, prepared, tmp_path):
    state, named = training(), MUTATIONS[mutate]
    with run(tmp_path, overlap=True) as ckpt:
        if prepared:
            ckpt.prepare(state)
            ckpt.save(1, state).result(PATIENCE)
        with pytest.warns(RuntimeWarning, match="changed while being copied") as warned, copies_held(ckpt) as go:
            handle = ckpt.save(2, state)
            assert not handle.wait_staged(0)
            mutate(state)
            go.set()
            with pytest.raises(asyncckpt.TornSnapshotError) as torn:
                handle.result(PATIENCE)
        assert named in torn.value.tensors
        assert named in str(torn.value) or len(torn.value.tensors) > 5
        assert handle.outcome == "failed"
        assert 2 not in ckpt.steps()
        assert "step-00000002/manifest.json" not in files(tmp_path)
        if mutate is freed:
            with pytest.raises(asyncckpt.UnsupportedStateError, match="freed"):
                ckpt.save(3, state)
            return
        with copies_held(ckpt) as go:
            handle = ckpt.save(3, state)
            expected = frozen(state)
            mutate(state)
            go.set()
            assert handle.result(PATIENCE) == "committed"
    assert len(warned) == 1
    loaded = asyncckpt.load(tmp_path, 3)
    assert difference(dict(expected["model"]), dict(loaded["model"])) is None
    assert difference(expected["optimizer"], loaded["optimizer"]) is None


def test_a_tear_says_all_that_changed_however_it_changed(tmp_path):
    state = training()
    model = state["model"]
    with run(tmp_path, overlap=True) as ckpt, pytest.warns(RuntimeWarning), copies_held(ckpt) as go:
        handle = ckpt.save(0, state)
        model[0].weight.data.add_(1)
        model[0].bias.data = torch.randn(30)
        with torch.no_grad():
            model[2].bias.add_(1)
        go.set()
        with pytest.raises(asyncckpt.TornSnapshotError) as torn:
            handle.result(PATIENCE)
    assert set(torn.value.tensors) == {"model/0.weight", "model/0.bias", "model/2.bias"}


def test_tensors_of_every_layout_and_width_are_looked_at(tmp_path):
    params = {
        "channels_last": nn.Parameter(torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)),
        "transposed": nn.Parameter(torch.randn(7, 5).t()),
        "half": nn.Parameter(torch.randn(9, dtype=torch.bfloat16)),
        "double": nn.Parameter(torch.randn(3, dtype=torch.float64)),
        "scalar": nn.Parameter(torch.tensor(1.0)),
    }
    optimizer = torch.optim.SGD(params.values(), lr=0.1)
    with run(tmp_path, overlap=True) as ckpt, pytest.warns(RuntimeWarning), copies_held(ckpt) as go:
        handle = ckpt.save(0, {"params": params, "optimizer": optimizer})
        for p in params.values():
            p.data.mul_(3)
        go.set()
        with pytest.raises(asyncckpt.TornSnapshotError) as torn:
            handle.result(PATIENCE)
    assert set(torn.value.tensors) == {f"params/{name}" for name in params}


def test_the_warning_is_given_once_and_other_tensors_are_learned_too(tmp_path):
    state = training()
    with run(tmp_path, overlap=True) as ckpt, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for step, layer in enumerate((0, 2)):
            with copies_held(ckpt) as go:
                handle = ckpt.save(step, state)
                state["model"][layer].weight.data.add_(1)
                go.set()
                with pytest.raises(asyncckpt.TornSnapshotError, match=f"model/{layer}.weight"):
                    handle.result(PATIENCE)
        with copies_held(ckpt) as go:
            handle = ckpt.save(2, state)
            expected = frozen(state["model"])
            state["model"][0].weight.data.add_(1), state["model"][2].weight.data.add_(1)
            go.set()
            handle.result(PATIENCE)
    assert [w.category for w in warned] == [RuntimeWarning]
    assert difference(dict(expected), dict(asyncckpt.load(tmp_path)["model"])) is None


def test_where_warnings_are_errors_the_save_still_ends(tmp_path):
    state = training()
    with run(tmp_path, overlap=True) as ckpt, warnings.catch_warnings(), copies_held(ckpt) as go:
        warnings.simplefilter("error")
        handle = ckpt.save(0, state)
        through_data(state)
        go.set()
        with pytest.raises(asyncckpt.TornSnapshotError):
            handle.result(PATIENCE)


def ended(handle):
    """Wait for the end without being told of the error."""
    over = threading.Event()
    handle.add_done_callback(lambda handle: over.set())
    assert over.wait(PATIENCE)


@pytest.mark.parametrize("policy", ["raise", "warn"])
def test_a_tear_does_not_stop_the_next_save_but_is_told_at_the_end(policy, tmp_path):
    state = training()
    ckpt = run(tmp_path, overlap=True, on_error=policy)
    with pytest.warns(RuntimeWarning) as warned, copies_held(ckpt) as go:
        handle = ckpt.save(0, state)
        through_data(state)
        go.set()
        ended(handle)
    ckpt.save(1, state).result(PATIENCE)
    with pytest.raises(asyncckpt.TornSnapshotError):
        ckpt.close()
    assert len(warned) == 1
    assert asyncckpt.open(tmp_path).steps() == [1]


def test_a_step_that_tore_may_be_saved_again(tmp_path):
    state = training()
    with run(tmp_path, overlap=True) as ckpt, pytest.warns(RuntimeWarning), copies_held(ckpt) as go:
        handle = ckpt.save(0, state)
        through_data(state)
        go.set()
        with pytest.raises(asyncckpt.TornSnapshotError):
            handle.result(PATIENCE)
        assert ckpt.save(0, state).result(PATIENCE) == "committed"


def test_a_false_alarm_is_never_raised_by_ordinary_training(tmp_path):
    """Forward, backward, clipping, zeroing, accumulation, evaluation and hooks leave what is copied alone."""
    state = training()
    model = state["model"]
    with run(tmp_path, overlap=True) as ckpt:
        for step in range(4):
            with copies_held(ckpt) as go:
                handle = ckpt.save(step, state)
                expected = frozen(model.state_dict())
                for _ in range(2):
                    model[:2](torch.randn(4, 30)).square().sum().backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                model.eval()
                with torch.no_grad():
                    model[:2](torch.randn(4, 30))
                model.train()
                nn.utils.parameters_to_vector(model.parameters())
                frozen(state)
                for p in model.parameters():
                    p.requires_grad_(False).requires_grad_(True)
                go.set()
                assert handle.result(PATIENCE) == "committed"
            state["optimizer"].step()
            state["optimizer"].zero_grad()
            assert difference(dict(expected), dict(asyncckpt.load(tmp_path)["model"])) is None


def test_memory_that_is_freed_before_a_save_is_refused(tmp_path):
    state = training()
    with run(tmp_path) as ckpt:
        ckpt.save(0, state).result(PATIENCE)
        before = files(tmp_path)
        state["model"][0].weight.untyped_storage().resize_(0)
        with pytest.raises(asyncckpt.UnsupportedStateError) as refused:
            ckpt.save(1, state)
        assert refused.value.path == "model['0.weight']"
        assert files(tmp_path) == before


def test_bits_see_what_numpy_sees():
    """The comparison that these tests stand on."""
    t = torch.randn(3, 4).t()
    assert bits(t) == np.ascontiguousarray(t.numpy()).tobytes()
    assert difference({"a": [t]}, {"a": [t.clone().mul_(-1)]}) == "it['a'][0]: other bits"
    assert difference(torch.tensor(0.0), torch.tensor(-0.0)) is not None
