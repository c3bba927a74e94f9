"""Who waits for a copy under way, who need not, and what is copied before `save` returns."""

import threading

import pytest
import torch
from support.torch_states import PATIENCE, copies_held, difference, frozen, run
from torch import nn

import asyncckpt


def training(seed=0, kind=torch.optim.AdamW, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    optimizer = kind(model.parameters(), lr=0.1, **options)
    state = {"model": model, "optimizer": optimizer}
    step(state)
    return state


def step(state):
    state["model"](torch.randn(3, 20)).square().sum().backward()
    state["optimizer"].step()
    state["optimizer"].zero_grad()


def committed(tmp_path, number, expected):
    """Whether a step holds what was recorded."""
    loaded = asyncckpt.load(tmp_path, number)
    return difference({k: dict(v) for k, v in expected.items()}, {k: dict(v) for k, v in loaded.items()}) is None


def by_step(ckpt, state):
    step(state)


def by_loading_the_model(ckpt, state):
    state["model"].load_state_dict(training(1)["model"].state_dict())


def by_loading_the_optimizer(ckpt, state):
    state["optimizer"].load_state_dict(training(1)["optimizer"].state_dict())
    state["model"].load_state_dict(training(1)["model"].state_dict())


def by_a_new_optimizer(ckpt, state):
    torch.optim.SGD(state["model"].parameters(), 0.5).step()


def by_fence(ckpt, state):
    ckpt.fence()
    for p in state["model"].parameters():
        p.data.add_(1)


def by_restoring(ckpt, state):
    assert ckpt.restore(state, 0) == 0


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize(
    "change", [by_step, by_loading_the_model, by_loading_the_optimizer, by_a_new_optimizer, by_fence, by_restoring]
)
def test_the_copy_is_joined(change, prepared, tmp_path):
    state = training()
    with run(tmp_path, overlap=True) as ckpt:
        if prepared:
            ckpt.prepare(state)
        ckpt.save(0, state).result(PATIENCE)
        step(state)
        with copies_held(ckpt):
            handle = ckpt.save(1, state)
            expected = frozen(state)
            assert not handle.wait_staged(0)
            for p in state["model"].parameters():
                p.grad = torch.ones_like(p)
            change(ckpt, state)
            assert handle.wait_staged(0)
        assert handle.result(PATIENCE) == "committed"
    assert committed(tmp_path, 1, expected)


def test_the_copy_ends_without_any_further_call(tmp_path):
    state = training()
    with run(tmp_path, overlap=True) as ckpt:
        handle = ckpt.save(0, state)
        assert handle.wait_staged(PATIENCE)
        over = threading.Event()
        handle.add_done_callback(lambda handle: over.set())
        assert over.wait(PATIENCE)
        assert handle.outcome == "committed"


def test_an_optimizer_of_something_else_does_not_wait(tmp_path):
    state = training()
    with run(tmp_path, overlap=True) as ckpt, copies_held(ckpt) as go:
        handle = ckpt.save(0, state)
        other = training(1)
        other["model"].load_state_dict(frozen(state["model"]))
        assert not handle.wait_staged(0)
        go.set()
        assert handle.result(PATIENCE) == "committed"


def test_any_of_several_optimizers_waits(tmp_path):
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    state = {"model": model, **{f"o{i}": torch.optim.SGD(model[i].parameters(), 0.1, 0.9) for i in (0, 1)}}
    with run(tmp_path, overlap=True, max_in_flight=3) as ckpt:
        for number in range(4):
            with copies_held(ckpt):
                handle = ckpt.save(number, state)
                expected = frozen(state)
                model(torch.randn(2, 20)).square().sum().backward()
                assert not handle.wait_staged(0)
                state[f"o{number % 2}"].step()
                assert handle.wait_staged(0)
                state[f"o{1 - number % 2}"].step()
            handle.result(PATIENCE)
            assert committed(tmp_path, number, expected)


def test_optimizers_that_step_during_the_backward_pass(tmp_path):
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    optimizers = {p: torch.optim.SGD([p], 0.1, momentum=0.9) for p in model.parameters()}

    def step_at_once(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in optimizers:
        p.register_post_accumulate_grad_hook(step_at_once)
    state = {"model": model, "optimizers": {str(i): o for i, o in enumerate(optimizers.values())}}
    with run(tmp_path, overlap=True) as ckpt:
        for number in range(3):
            with copies_held(ckpt):
                handle = ckpt.save(number, state)
                expected = frozen(state)
                assert handle.wait_staged(0) is (number == 0)  # nested optimizers are known once they have stepped
                model(torch.randn(2, 20)).square().sum().backward()
            handle.result(PATIENCE)
            loaded = asyncckpt.load(tmp_path, number)
            assert difference(dict(expected["model"]), dict(loaded["model"])) is None
            assert difference(expected["optimizers"], loaded["optimizers"]) is None


def test_what_no_optimizer_owns_is_copied_before_save_returns(tmp_path):
    model = nn.Linear(20, 20)
    with run(tmp_path, overlap=True) as ckpt, copies_held(ckpt):
        for number in range(2):
            handle = ckpt.save(number, {"model": model, "ema": [torch.ones(9)]})
            if number:
                assert handle.wait_staged(0)
            else:
                ckpt.fence()


def test_without_overlap_all_is_copied_before_save_returns(tmp_path):
    state = training()
    with run(tmp_path, overlap=False) as ckpt, copies_held(ckpt):
        for number in range(2):
            assert ckpt.save(number, state).wait_staged(0)


@pytest.mark.parametrize("prepared", [True, False])
def test_capturable_optimizers_are_copied_before_save_returns(prepared, tmp_path):
    """Their steps may be replayed by a CUDA graph, which calls no hook."""
    state = training()
    with run(tmp_path, overlap=True) as ckpt:
        if prepared:
            ckpt.prepare(state)
            ckpt.save(0, state).result(PATIENCE)
        state["optimizer"].param_groups[0]["capturable"] = True
        with copies_held(ckpt):
            handle = ckpt.save(1, state)
            expected = frozen(state)
            for p in state["model"].parameters():
                p.data.add_(1)
            for entry in state["optimizer"].state.values():
                entry["exp_avg"].data.add_(1)
        handle.result(PATIENCE)
    assert committed(tmp_path, 1, expected)


def test_overlap_parts_wait_for_a_fence_of_their_owner(tmp_path):
    state = training()
    state["ema"] = torch.optim.swa_utils.AveragedModel(state["model"], use_buffers=True)
    with run(tmp_path, overlap=True, overlap_parts=("ema",)) as ckpt:
        ckpt.prepare(state)
        for number in range(3):
            with copies_held(ckpt):
                handle = ckpt.save(number, state)
                expected = frozen(state)
                assert not handle.wait_staged(0)
                ckpt.fence()
                assert handle.wait_staged(0)
                state["ema"].update_parameters(state["model"])
                step(state)
            handle.result(PATIENCE)
            assert committed(tmp_path, number, expected)


def test_overlap_parts_changed_without_a_fence_tear(tmp_path):
    ema = {"w": torch.ones(50)}
    options = {"overlap": True, "overlap_parts": ("ema",)}
    with run(tmp_path, **options) as ckpt, pytest.warns(RuntimeWarning), copies_held(ckpt) as go:
        handle = ckpt.save(0, {"ema": ema})
        ema["w"].mul_(0.9)
        go.set()
        with pytest.raises(asyncckpt.TornSnapshotError, match="ema/w"):
            handle.result(PATIENCE)


def test_two_copies_at_once_are_both_joined(tmp_path):
    state = training()
    with run(tmp_path, overlap=True, max_in_flight=2) as ckpt:
        with copies_held(ckpt):
            handles = [ckpt.save(number, state) for number in range(2)]
            expected = frozen(state)
            assert not any(handle.wait_staged(0) for handle in handles)
            step(state)
            assert all(handle.wait_staged(0) for handle in handles)
        ckpt.wait_until_flushed(PATIENCE)
    assert committed(tmp_path, 0, expected) and committed(tmp_path, 1, expected)


def test_closing_and_flushing_wait_for_the_copy(tmp_path):
    state = training()
    with run(tmp_path, overlap=True) as ckpt:
        with copies_held(ckpt) as go:
            ckpt.save(0, state)
            with pytest.raises(TimeoutError, match="step 0"):
                ckpt.wait_until_flushed(timeout=0.05)
            go.set()
            ckpt.wait_until_flushed(PATIENCE)
        ckpt.save(1, state)
    assert asyncckpt.open(tmp_path).steps() == [0, 1]


def test_two_checkpointers_fence_one_training(tmp_path):
    state = training()
    a, b = run(tmp_path / "a", overlap=True), run(tmp_path / "b", overlap=True)
    with a, b, copies_held(a), copies_held(b):
        handles = [ckpt.save(0, state) for ckpt in (a, b)]
        expected = frozen(state)
        step(state)
        assert all(handle.wait_staged(0) for handle in handles)
    assert committed(tmp_path / "a", 0, expected) and committed(tmp_path / "b", 0, expected)


def test_the_time_spent_at_the_fence_is_counted(tmp_path):
    state = training()
    with run(tmp_path, overlap=True) as ckpt:
        assert ckpt.stats().fenced == 0
        with copies_held(ckpt):
            ckpt.save(0, state)
            step(state)
        assert ckpt.stats().fenced > 0
