"""Modules: everything their state dict holds, however it comes to hold it."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from support.torch_states import difference, frozen, run
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import asyncckpt


class Counting(nn.Module):
    """Its state is more than tensors, and its tensors change from one save to the next."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def get_extra_state(self):
        return self.seen

    def set_extra_state(self, state):
        self.seen = dict(state)


class Renaming(nn.Linear):
    """Its state dict is not the tree of its tensors: one is renamed, one is made on the spot."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "kernel"] = self.weight
        destination[prefix + "norm"] = self.weight.detach().norm()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        with torch.no_grad():
            self.weight.copy_(state_dict[prefix + "kernel"])


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).mT


def with_buffers():
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Sequential(nn.Linear(2, 2), nn.PReLU()))
    model.register_buffer("scratch", torch.ones(9), persistent=False)
    model.register_buffer("nothing", None)
    model[2].register_buffer("phase", torch.randn(3, dtype=torch.complex64))
    model[:2](torch.randn(2, 2, 3, 3))
    return model


def hooked():
    model = nn.Linear(2, 2)
    model.register_state_dict_post_hook(
        lambda module, state, prefix, _: state.update({prefix + "double": module.weight.detach() * 2})
    )
    model.register_load_state_dict_pre_hook(lambda module, state, prefix, *_: state.pop(prefix + "double"))
    return model


def parametrized():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    parametrizations.weight_norm(model[0])
    parametrizations.spectral_norm(model[1])
    parametrizations.orthogonal(model[2])
    parametrize.register_parametrization(model[3], "weight", Symmetric())
    return model


def half_channels_last():
    return nn.Conv2d(3, 4, 3).to(torch.bfloat16).to(memory_format=torch.channels_last)


MODULES = {
    "buffers": with_buffers,
    "nested": lambda: nn.ModuleDict(
        {"a": nn.ModuleList([nn.LSTM(2, 3, 2), nn.MultiheadAttention(4, 2)]), "b": nn.TransformerEncoderLayer(4, 2, 8)}
    ),
    "lists": lambda: nn.ParameterDict({"p": nn.Parameter(torch.randn(2)), "q": nn.Parameter(torch.randn(()))}),
    "hooks": hooked,
    "renaming": lambda: nn.Sequential(Renaming(2, 2, bias=False)),
    "parametrized": parametrized,
    "no tensors": lambda: nn.Sequential(nn.ReLU(), nn.Dropout()),
    "averaged": lambda: torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2)),
    "half": half_channels_last,
    "double": lambda: nn.Linear(2, 2).double(),
    "lazy": lambda: ran(nn.LazyLinear(3)),
}


def ran(model):
    model(torch.ones(2))
    return model


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("kind", MODULES)
def test_modules_come_back(kind, overlap, tmp_path):
    torch.manual_seed(1)
    model, twin = MODULES[kind](), MODULES[kind]()
    optimizer = torch.optim.SGD([*model.parameters(), nn.Parameter(torch.ones(1))], 0.1)
    expected = frozen(model)
    with run(tmp_path, overlap=overlap) as ckpt:
        for step in range(3):
            ckpt.save(step, {"model": model, "optimizer": optimizer})
    for step in range(3):
        assert difference(dict(expected), dict(asyncckpt.load(tmp_path, step)["model"])) is None
    before = {name: p.data_ptr() for name, p in twin.named_parameters()}
    assert asyncckpt.restore(tmp_path, {"model": twin}, parts=["model"]) == 2
    assert {name: p.data_ptr() for name, p in twin.named_parameters()} == before
    assert difference(dict(expected), dict(twin.state_dict())) is None
    assert {n: p.stride() for n, p in twin.named_parameters()} == {n: p.stride() for n, p in model.named_parameters()}


def test_the_version_metadata_of_modules_is_kept(tmp_path):
    model = with_buffers()
    with run(tmp_path) as ckpt:
        ckpt.save(0, {"model": model})
    loaded = asyncckpt.load(tmp_path)["model"]
    assert loaded._metadata == model.state_dict()._metadata
    assert loaded._metadata["1"] == {"version": 2}
    model.load_state_dict(loaded)


def test_a_buffer_that_is_not_persistent_is_left_alone(tmp_path):
    model = with_buffers()
    with run(tmp_path) as ckpt:
        ckpt.save(0, {"model": model})
        model.scratch.fill_(7)
        ckpt.restore({"model": model})
    assert "scratch" not in asyncckpt.load(tmp_path)["model"]
    assert model.scratch.tolist() == [7] * 9


def test_extra_state_is_for_its_module_to_judge(tmp_path):
    """What it has grown to meanwhile need not fit what was saved."""
    model = nn.Sequential(Counting(), nn.Linear(1, 1))
    seen = [{"a": torch.ones(2)}, {"b": torch.ones(3), "n": [1, 2]}, {}]
    with run(tmp_path) as ckpt:
        for step, state in enumerate(seen):
            model[0].seen = state
            ckpt.save(step, {"model": model})
        for step, state in enumerate(seen):
            assert ckpt.restore({"model": model}, step) == step
            assert difference(model[0].seen, state) is None


def test_a_lazy_conjugate_among_the_buffers_is_saved_as_it_is_each_time(tmp_path):
    z = torch.randn(3, dtype=torch.complex64)
    model = nn.Linear(2, 2)
    model.register_buffer("conj", z.conj())
    with run(tmp_path) as ckpt:
        for step in range(3):
            z.add_(1)
            ckpt.save(step, {"model": model})
            ckpt.wait_until_flushed()
            assert difference(model.conj, asyncckpt.load(tmp_path, step)["model"]["conj"]) is None


UNPICKLE = """
import pickle, sys
with open(sys.argv[1], "rb") as file:
    model = pickle.load(file)
model.load_state_dict(model.state_dict())
assert "asyncckpt" not in sys.modules
"""


def test_saved_modules_can_still_be_copied_and_pickled(tmp_path):
    """The hook that joins copies before loading neither travels along nor gets in the way."""
    model = nn.Sequential(nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with run(tmp_path / "run", overlap=True) as ckpt:
        ckpt.save(0, {"model": model, "optimizer": optimizer})
        twin = copy.deepcopy(model)
        twin.load_state_dict(model.state_dict())
        copy.deepcopy(optimizer).load_state_dict(optimizer.state_dict())
        (tmp_path / "pickle").write_bytes(pickle.dumps(model))
    subprocess.run([sys.executable, "-c", UNPICKLE, str(tmp_path / "pickle")], check=True, timeout=60)
    assert not model._load_state_dict_pre_hooks
    assert not optimizer._optimizer_load_state_dict_pre_hooks
