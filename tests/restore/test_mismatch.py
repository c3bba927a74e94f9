"""What does not fit is named before anything is changed; what is asked to be left out is."""

import pytest
import torch
from support.torch_states import difference, frozen, run
from torch import nn

import asyncckpt


def net(**layers):
    torch.manual_seed(0)
    return nn.ModuleDict(layers)


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of a model, its optimizer, plain values, and the state of the generators."""
    model = net(a=nn.Linear(3, 3), b=nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    state = {
        "model": model,
        "optimizer": optimizer,
        "plain": {"w": torch.ones(4), "items": [torch.ones(2), 1], "n": 3},
        "rng": asyncckpt.RngState(),
    }
    with run(tmp_path) as ckpt:
        ckpt.save(1, state)
    return tmp_path, state


def refused(path, live, **options):
    """The error of a restore that must change nothing."""
    before = frozen(live)
    with pytest.raises(asyncckpt.StateMismatchError) as error:
        asyncckpt.restore(path, live, **options)
    assert difference(before, frozen(live)) is None
    return error.value


def test_missing_unexpected_and_misshaped_keys_are_all_named(saved):
    path, _ = saved
    live = {
        "plain": {"w": torch.zeros(5), "items": [torch.zeros(2), 0], "n": 0, "more": torch.zeros(1)},
        "model": net(a=nn.Linear(3, 3), b=nn.Linear(4, 2), c=nn.Linear(1, 1)),
    }
    error = refused(path, live, parts=["plain", "model"])
    assert set(error.missing) == {"plain['more']", "model['c.weight']", "model['c.bias']"}
    assert error.unexpected == ()
    assert {text.split(" ")[0] for text in error.misshaped} == {"plain['w']", "model['b.weight']"}
    error = refused(path, {"model": net(a=nn.Linear(3, 3))}, parts=["model"])
    assert set(error.unexpected) == {"model['b.weight']", "model['b.bias']"}
    for key in error.unexpected:
        assert key in str(error)
    assert "nothing was changed" in str(error)


def test_parts_of_one_side_only_are_named(saved):
    path, state = saved
    error = refused(path, {"model": state["model"], "extra": {}})
    assert error.missing == ("extra",)
    assert set(error.unexpected) == {"optimizer", "plain", "rng"}


@pytest.mark.parametrize(
    "live",
    [
        {"plain": {"w": torch.zeros(4), "items": [torch.zeros(2)], "n": 0}},
        {"plain": {"w": torch.zeros(4), "items": {"0": torch.zeros(2)}, "n": 0}},
        {"plain": torch.zeros(3)},
        {"plain": [torch.zeros(4), [torch.zeros(2), 1], 3]},
        {"plain": {"w": torch.zeros(4), "items": [torch.zeros(2), torch.zeros(1)], "n": 0}},
        {"model": {"a": {"weight": torch.zeros(3, 3)}}},
        {"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1)},
        {"plain": torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1)},
        {"optimizer": nn.Linear(2, 2)},
    ],
    ids=range(9),
)
def test_another_form_is_refused_whatever_strict_says(live, saved):
    path, _ = saved
    refused(path, live, parts=list(live))
    if not isinstance(live.get("optimizer"), nn.Module) and "model" not in live:
        assert refused(path, live, parts=list(live), strict=False).misshaped


def test_one_part_that_does_not_fit_keeps_all_from_being_changed(saved):
    path, state = saved
    live = {name: state[name] for name in ("model", "rng", "optimizer")}
    live["plain"] = {"w": torch.zeros(4), "items": [torch.zeros(2), 1], "n": 3, "more": torch.zeros(1)}
    with torch.no_grad():
        live["model"]["a"].weight.zero_()
    refused(path, live)


@pytest.mark.parametrize("states", [[16], [16, 16, 16], [16, 8], []], ids=str)
def test_states_of_other_cuda_generators_than_there_are_keep_all_from_being_changed(tmp_path, monkeypatch, states):
    """A checkpoint from a machine with other devices, on one with two."""
    generators = asyncckpt.RngState()
    there = generators.state_dict() | {"cuda": [torch.zeros(size, dtype=torch.uint8) for size in states]}
    with run(tmp_path) as ckpt:
        ckpt.save(1, {"model": net(a=nn.Linear(2, 2)), "rng": there})
    live = {"model": net(a=nn.Linear(2, 2)), "rng": generators}
    with torch.no_grad():
        live["model"]["a"].weight.zero_()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.ones(16, dtype=torch.uint8))
    error = refused(tmp_path, live)
    assert error.misshaped and "CUDA" in str(error)
    assert refused(tmp_path, live, strict=False).misshaped
    with pytest.raises(asyncckpt.StateMismatchError, match="CUDA"):
        generators.load_state_dict(there)
    assert asyncckpt.restore(tmp_path, live, parts=["model"]) == 1


def test_not_strict_leaves_out_what_one_side_lacks(saved):
    path, state = saved
    live = {
        "model": net(a=nn.Linear(3, 3), c=nn.Linear(2, 2)),
        "extra": {"x": torch.zeros(2)},
        "plain": {"n": 0, "z": 5},
    }
    untouched = frozen(live["model"]["c"])
    assert asyncckpt.restore(path, live, strict=False) == 1
    assert difference(frozen(state["model"]["a"]), frozen(live["model"]["a"])) is None
    assert difference(untouched, frozen(live["model"]["c"])) is None
    assert live["plain"] == {"n": 3, "z": 5}
    assert live["extra"]["x"].tolist() == [0, 0]
    error = refused(path, {"model": net(a=nn.Linear(3, 4))}, strict=False)
    assert error.misshaped and not error.missing


def test_parts_restores_these_and_leaves_the_others(saved):
    path, state = saved
    live = {
        "model": net(a=nn.Linear(3, 3), b=nn.Linear(3, 2)),
        "plain": {"w": torch.zeros(4), "items": [torch.zeros(2), 0], "n": 0},
    }
    with torch.no_grad():
        live["model"]["a"].weight.zero_()
    assert asyncckpt.restore(path, live, parts="plain") == 1
    assert difference(state["plain"], live["plain"]) is None
    assert live["model"]["a"].weight.count_nonzero() == 0
    assert asyncckpt.restore(path, live, parts=("model",)) == 1
    assert difference(frozen(state["model"]), frozen(live["model"])) is None
    with pytest.raises(asyncckpt.StateMismatchError, match="other"):
        asyncckpt.restore(path, live, parts=["other"])
    with pytest.raises(asyncckpt.CheckpointNotFoundError, match="other"):
        asyncckpt.restore(path, {"other": {}}, parts=["other"])


@pytest.mark.parametrize(
    ("wrapper", "rename"),
    [
        ("_orig_mod", {"": "_orig_mod."}),
        ("module", lambda key: "module." + key),
        ("module", {"": "module."}),
    ],
    ids=["mapping", "function", "ddp"],
)
@pytest.mark.parametrize("back", [False, True])
def test_prefixes_of_wrappers(back, wrapper, rename, saved):
    """Into a wrapped model, and back out of a checkpoint of one; optimizer and generators have no such names."""
    path, state = saved
    wrapped = nn.ModuleDict({wrapper: net(a=nn.Linear(3, 3), b=nn.Linear(3, 2))})
    with torch.no_grad():
        wrapped[wrapper]["a"].weight.zero_()
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.5, momentum=0.5)
    plain = {"w": torch.zeros(4), "items": [torch.zeros(2), 1], "n": 3}
    live = {"model": wrapped, "optimizer": optimizer, "rng": asyncckpt.RngState()}
    if back:
        with run(path / "wrapped") as ckpt:
            ckpt.save(2, live)
        expected = frozen(wrapped[wrapper])
        target = {"model": state["model"], "optimizer": state["optimizer"], "rng": state["rng"]}
        refused(path / "wrapped", target)
        assert asyncckpt.restore(path / "wrapped", target, rename={f"{wrapper}.": ""}) == 2
        assert difference(expected, frozen(state["model"])) is None
        return
    refused(path, live | {"plain": plain})
    assert asyncckpt.restore(path, live, parts=list(live), rename=rename) == 1
    assert difference(frozen(state["model"]), frozen(wrapped[wrapper])) is None
    assert difference(frozen(state["optimizer"]), frozen(optimizer)) is None


def test_renaming_to_other_layers(saved):
    path, state = saved
    live = {"model": net(first=nn.Linear(3, 3), second=nn.Linear(3, 2))}
    rename = {"a.": "first.", "b.": "second."}
    assert asyncckpt.restore(path, live, parts=["model"], rename=rename) == 1
    assert difference(list(frozen(state["model"]).values()), list(frozen(live["model"]).values())) is None
    plain = {"v": torch.zeros(4), "items": [torch.zeros(2), 0], "n": 0}
    assert asyncckpt.restore(path, {"plain": plain}, parts=["plain"], rename={"w": "v"}) == 1
    assert plain["v"].tolist() == [1] * 4


def test_two_names_that_become_one_are_refused(saved):
    path, _ = saved
    live = {"model": net(a=nn.Linear(3, 3))}
    with pytest.raises(asyncckpt.StateMismatchError, match=r"a\.weight, a\.bias"):
        asyncckpt.restore(path, live, parts=["model"], rename={"b.": "a."}, strict=False)
