"""A restore fills the live objects: same tensors, same memory, the bits of the checkpoint."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
from support.torch_states import PATIENCE, difference, frozen, run
from torch import nn

import asyncckpt


def training(seed=0, width=12):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Linear(width, 2))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    model(torch.randn(5, width)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return {"model": model, "optimizer": optimizer}


def pointers(model):
    return {name: (id(t), t.data_ptr()) for name, t in (*model.named_parameters(), *model.named_buffers())}


RESTORE = {
    "Checkpointer": lambda ckpt, path, state: ckpt.restore(state),
    "restore": lambda ckpt, path, state: asyncckpt.restore(path, state),
    "open": lambda ckpt, path, state: asyncckpt.open(path).restore(state),
    "step": lambda ckpt, path, state: ckpt.restore(state, 3),
}


@pytest.mark.parametrize("how", RESTORE)
def test_live_tensors_stay_where_they_are(how, tmp_path):
    ours, twin = training(0), training(1)
    model, optimizer, before = twin["model"], twin["optimizer"], pointers(twin["model"])
    expected = frozen(ours)
    with run(tmp_path) as ckpt:
        ckpt.save(3, ours).result(PATIENCE)
        assert RESTORE[how](ckpt, tmp_path, twin) == 3
        assert twin["model"] is model and twin["optimizer"] is optimizer
        assert pointers(model) == before
        assert difference(expected, frozen(twin)) is None
        for group in optimizer.param_groups:
            assert all(p is q for p, q in zip(group["params"], model.parameters(), strict=True))
            assert all(optimizer.state[p] for p in group["params"])


def test_containers_are_filled_where_they_are(tmp_path):
    def made(fill):
        return {
            "tensor": torch.full((3,), fill), "array": np.full(3, fill), "list": [torch.full((2,), fill), fill],
            "tuple": (torch.full((2,), fill), fill), "ordered": OrderedDict(a=torch.full((1,), fill), b=fill),
            "plain": {"n": fill, "history": [fill] * int(fill)}, "view": torch.full((4,), fill)[1:],
            "turned": torch.full((2, 3), fill).t(), "expanded": torch.full((1,), fill).expand(4),
        }  # fmt: skip

    ours, twin = made(3.0), made(5.0)
    kept = {name: twin[name] for name in ("tensor", "array", "list", "ordered", "plain", "view", "turned", "expanded")}
    inner = [twin["list"][0], twin["tuple"][0], twin["ordered"]["a"]]
    with run(tmp_path) as ckpt:
        ckpt.save(0, {"part": ours})
        assert ckpt.restore({"part": twin}) == 0
    assert difference(ours, twin) is None
    assert all(twin[name] is value for name, value in kept.items())
    assert all(a is b for a, b in zip(inner, [twin["list"][0], twin["tuple"][0], twin["ordered"]["a"]], strict=True))


def test_a_whole_part_that_is_a_value_is_replaced_in_the_state(tmp_path):
    state = {"step": 7, "note": "hi", "w": torch.ones(2)}
    with run(tmp_path) as ckpt:
        ckpt.save(0, state)
        other = {"step": 0, "note": None, "w": torch.zeros(2)}
        w = other["w"]
        ckpt.restore(other)
    assert (other["step"], other["note"], other["w"]) == (7, "hi", w)
    assert w.tolist() == [1, 1]


def test_arrays_that_can_not_be_filled_are_replaced(tmp_path):
    frozen_array = np.arange(3)
    frozen_array.flags.writeable = False
    with run(tmp_path) as ckpt:
        ckpt.save(0, {"part": {"text": np.array(["abcdef"]), "frozen": np.arange(3, 6), "wider": np.ones(2)}})
        live = {"text": np.array(["a"]), "frozen": frozen_array, "wider": np.zeros(2, np.float32)}
        ckpt.restore({"part": live})
    assert difference({"text": np.array(["abcdef"]), "frozen": np.arange(3, 6), "wider": np.ones(2)}, live) is None


def test_tied_and_shared_memory_of_live_objects_is_kept(tmp_path):
    def made(seed):
        torch.manual_seed(seed)
        model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
        model["head"].weight = model["embed"].weight
        memory = torch.randn(10)
        return {"model": model, "part": {"a": memory[:6], "b": memory[4:]}}

    ours, twin = made(0), made(1)
    with run(tmp_path) as ckpt:
        ckpt.save(0, ours)
        ckpt.restore(twin)
    assert twin["model"]["head"].weight is twin["model"]["embed"].weight
    assert twin["part"]["b"].data_ptr() == twin["part"]["a"][4:].data_ptr()
    assert difference(frozen(ours), frozen(twin)) is None


@pytest.mark.parametrize("live", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_of_another_precision_is_filled_in_its_own(live, tmp_path):
    ours, twin = training(0), training(1)
    twin["model"].to(live)
    before = pointers(twin["model"])
    with run(tmp_path) as ckpt:
        ckpt.save(0, ours)
        ckpt.restore(twin, parts=["model"])
    assert pointers(twin["model"]) == before
    for name, value in ours["model"].state_dict().items():
        expected = value.to(live) if value.is_floating_point() else value
        assert difference(expected, twin["model"].state_dict()[name]) is None


def test_a_model_whose_class_is_not_the_one_that_was_saved(tmp_path):
    """Names and shapes are what counts."""
    model = nn.Linear(3, 3)
    with run(tmp_path) as ckpt:
        ckpt.save(0, {"model": model})
        plain = {"weight": torch.zeros(3, 3), "bias": torch.zeros(3)}
        ckpt.restore({"model": plain})
        assert difference(dict(frozen(model)), plain) is None


def test_restoring_the_step_asked_for(tmp_path):
    state = {"model": nn.Linear(2, 2)}
    recorded = {}
    with run(tmp_path) as ckpt:
        for step in (1, 5, 10):
            with torch.no_grad():
                state["model"].weight.fill_(step)
            recorded[step] = frozen(state)
            ckpt.save(step, state)
        for step in (5, 10, 1):
            assert ckpt.restore(state, step) == step
            assert difference(recorded[step], frozen(state)) is None
        assert ckpt.restore(state) == 10
        with pytest.raises(asyncckpt.CheckpointNotFoundError, match="7"):
            ckpt.restore(state, 7)


def test_restoring_beside_a_live_checkpointer(tmp_path):
    ours, twin = training(0), training(1)
    with run(tmp_path) as ckpt:
        ckpt.save(0, ours).result(PATIENCE)
        assert asyncckpt.restore(tmp_path, twin) == 0
        assert difference(frozen(ours), frozen(twin)) is None
        ours["model"](torch.randn(5, 12)).square().sum().backward()
        ours["optimizer"].step()
        ckpt.save(1, ours).result(PATIENCE)
        assert asyncckpt.restore(tmp_path, twin) == 1
        assert difference(frozen(ours), frozen(twin)) is None
