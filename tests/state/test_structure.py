"""A save skips the walk of a module or optimizer that has not changed. These changes it must notice."""

import numpy as np
import pytest
import torch
from support.torch_states import difference, frozen, run
from torch import nn

import asyncckpt


def model():
    net = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), "c": nn.PReLU()})
    net["a"].register_parameter("absent", None)
    net["a"].register_buffer("hidden", torch.ones(4), persistent=False)
    net["a"].register_buffer("shown", torch.ones(4))
    return net


def added_layer(net):
    net["b"].append(nn.Linear(3, 2))


def removed_layer(net):
    del net["c"]


def replaced_layer(net):
    net["b"][0] = nn.Linear(3, 3)


def swapped_layers(net):
    net["a"], net["b"][0] = net["b"][0], net["a"]


def replaced_parameter(net):
    net["a"].weight = nn.Parameter(torch.randn(3, 3))


def added_parameter(net):
    net["c"].register_parameter("new", nn.Parameter(torch.ones(1)))


def parameter_to_none(net):
    net["a"].bias = None


def parameter_in_place_of_none(net):
    del net["a"].absent
    net["a"].register_parameter("present", nn.Parameter(torch.ones(2)))


def replaced_buffer(net):
    net["b"][1].running_mean = torch.randn(3)


def buffers_trade_persistence(net):
    hidden, shown = net["a"].hidden, net["a"].shown
    del net["a"].hidden, net["a"].shown
    net["a"].register_buffer("hidden", hidden)
    net["a"].register_buffer("shown", shown, persistent=False)


def new_data(net):
    net["a"].weight.data = torch.randn(3, 3)


def turned_data(net):
    net["a"].weight.data = net["a"].weight.data.t()


def shortened_data(net):
    net["a"].weight.data = net["a"].weight.data[:2]


def data_of_another_dtype(net):
    net["a"].shown.data = net["a"].shown.data.view(torch.int32)


def resized(net):
    net["b"][1].running_mean.resize_(2)


def resized_larger(net):
    net["b"][1].running_mean.resize_(1000).fill_(1)


def half(net):
    net.half()


def tied(net):
    net["b"][0].weight = net["a"].weight


def hook_added(net):
    net["c"].register_state_dict_post_hook(
        lambda module, state, prefix, _: state.update({prefix + "more": torch.ones(1)})
    )


def parametrized(net):
    nn.utils.parametrizations.weight_norm(net["a"])


CHANGES = [
    added_layer, removed_layer, replaced_layer, swapped_layers, replaced_parameter, added_parameter, parameter_to_none,
    parameter_in_place_of_none, replaced_buffer, buffers_trade_persistence, new_data, turned_data, shortened_data,
    data_of_another_dtype, resized, resized_larger, half, tied, hook_added, parametrized,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("overlap", [True, False])
def test_a_module_that_changed_is_saved_as_it_is(overlap, change, tmp_path):
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with run(tmp_path, overlap=overlap) as ckpt:
        ckpt.save(0, {"model": net, "optimizer": optimizer})
        ckpt.save(1, {"model": net, "optimizer": optimizer})
        ckpt.wait_until_flushed()
        change(net)
        expected = frozen(net)
        ckpt.save(2, {"model": net, "optimizer": optimizer})
        ckpt.save(3, {"model": net, "optimizer": optimizer})
    for step in (2, 3):
        assert difference(dict(expected), dict(asyncckpt.load(tmp_path, step)["model"])) is None
    assert difference(dict(expected), dict(asyncckpt.load(tmp_path, 0)["model"])) is not None


def test_another_module_under_the_same_name(tmp_path):
    with run(tmp_path) as ckpt:
        for step in range(4):
            net = nn.Linear(3, 3)
            ckpt.save(step, {"model": net})
            expected = frozen(net)
            del net
            ckpt.wait_until_flushed()
            assert difference(dict(expected), dict(asyncckpt.load(tmp_path, step)["model"])) is None


def test_a_hook_that_gathers_the_state_runs_at_every_save(tmp_path):
    net, elsewhere = nn.Linear(3, 3), torch.zeros(3, 3)
    with run(tmp_path) as ckpt:
        ckpt.save(0, {"model": net})
        net.register_state_dict_pre_hook(lambda module, prefix, keep: module.weight.data.copy_(elsewhere))
        for step in (1, 2, 3):
            elsewhere.fill_(step)
            ckpt.save(step, {"model": net}).result(10)
            assert difference(elsewhere, asyncckpt.load(tmp_path, step)["model"]["weight"]) is None


def stepped(net, kind=torch.optim.Adam, **options):
    optimizer = kind(net.parameters(), **options)
    step(net, optimizer)
    return optimizer


def step(net, optimizer):
    net(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def new_group(net, optimizer):
    optimizer.add_param_group({"params": [nn.Parameter(torch.randn(2))], "lr": 0.5})


def new_rate(net, optimizer):
    optimizer.param_groups[0]["lr"] = 0.25


def tensor_rate(net, optimizer):
    optimizer.param_groups[0]["lr"] = torch.tensor(0.25)


def new_key(net, optimizer):
    optimizer.param_groups[0]["note"] = {"why": ["because", 1.5]}


def array_in_group(net, optimizer):
    optimizer.param_groups[0]["table"] = torch.arange(3).numpy()


def tensors_inside_a_group(net, optimizer):
    optimizer.param_groups[0]["betas"] = (torch.tensor(0.5), torch.tensor(0.25))


def replaced_state(net, optimizer):
    optimizer.state[net.weight]["exp_avg"] = torch.randn(3, 3)


def new_state_key(net, optimizer):
    optimizer.state[net.weight]["extra"] = torch.randn(3)


def state_key_traded(net, optimizer):
    entry = optimizer.state[net.weight]
    entry["renamed"] = entry.pop("exp_avg")


def number_in_state(net, optimizer):
    optimizer.state[net.weight]["step"] = 7


def forgotten_state(net, optimizer):
    del optimizer.state[net.weight]


def all_forgotten(net, optimizer):
    optimizer.state.clear()


def fewer_params(net, optimizer):
    del optimizer.state[optimizer.param_groups[0]["params"].pop()]


def params_swapped(net, optimizer):
    optimizer.param_groups[0]["params"].reverse()


def loaded(net, optimizer):
    state = optimizer.state_dict()
    optimizer.load_state_dict(
        {"state": {0: state["state"][1], 1: state["state"][0]}, "param_groups": state["param_groups"]}
    )


def hooked(net, optimizer):
    optimizer.register_state_dict_post_hook(lambda optimizer, state: state | {"more": 1})


OPTIMIZER_CHANGES = [
    new_group, new_rate, tensor_rate, new_key, array_in_group, tensors_inside_a_group, replaced_state, new_state_key,
    state_key_traded, number_in_state, forgotten_state, all_forgotten, fewer_params, params_swapped, loaded, hooked,
]  # fmt: skip


@pytest.mark.parametrize("change", OPTIMIZER_CHANGES)
@pytest.mark.parametrize("overlap", [True, False])
def test_an_optimizer_that_changed_is_saved_as_it_is(overlap, change, tmp_path):
    net = nn.Linear(3, 3)
    optimizer = stepped(net)
    with run(tmp_path, overlap=overlap) as ckpt:
        ckpt.save(0, {"model": net, "optimizer": optimizer})
        ckpt.save(1, {"model": net, "optimizer": optimizer})
        ckpt.wait_until_flushed()
        change(net, optimizer)
        expected = frozen(optimizer)
        for number in (2, 3, 4):
            ckpt.save(number, {"model": net, "optimizer": optimizer})
    for number in (2, 3, 4):
        assert difference(expected, asyncckpt.load(tmp_path, number)["optimizer"]) is None
    assert difference(expected, asyncckpt.load(tmp_path, 0)["optimizer"]) is not None


@pytest.mark.parametrize(
    "value",
    [(torch.ones(1), torch.ones(2)), np.ones((3, 2)), [torch.ones(2)]],
    ids=["tuple", "array", "list"],
)
def test_tensors_among_the_hyperparameters_are_saved_at_every_save(value, tmp_path):
    net = nn.Linear(3, 3)
    optimizer = stepped(net)
    optimizer.param_groups[0]["schedule"] = value
    with run(tmp_path) as ckpt:
        for number in range(3):
            value[0][...] = number
            expected = frozen(optimizer)
            ckpt.save(number, {"optimizer": optimizer}).result(10)
            assert difference(expected, asyncckpt.load(tmp_path)["optimizer"]) is None
