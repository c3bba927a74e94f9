"""Promise 8: a checkpoint holds the state as it was when `save` was called, whatever happens afterwards."""

import itertools
import random

import numpy as np
import pytest
import torch
from support.torch_states import PATIENCE, copies_held, difference, frozen, run
from torch import nn

import asyncckpt

OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, 0.1, momentum=0.9, foreach=False),
    "adamw": lambda params: torch.optim.AdamW(params, 0.1, foreach=False),
    "foreach": lambda params: torch.optim.AdamW(params, 0.1, foreach=True),
    "fused": lambda params: torch.optim.AdamW(params, 0.1, fused=True),
    "lbfgs": lambda params: torch.optim.LBFGS(params, 0.1, max_iter=2),
}


class Loader:
    def __init__(self):
        self.position, self.order, self.history = 0, np.arange(10), []

    def state_dict(self):
        return {"position": self.position, "order": self.order, "history": self.history}

    def load_state_dict(self, state):
        self.position, self.order, self.history = state["position"], state["order"], state["history"]


class Net(nn.Module):
    """Tied weights, buffers that the forward pass writes, a parameter of no dimension, one of another dtype."""

    def __init__(self, turned):
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.norm = nn.BatchNorm1d(6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.wide = nn.Parameter(torch.randn(5, 3, dtype=torch.float64).t() if turned else torch.randn(9))
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("window", torch.zeros(8))
        self.register_buffer("recent", self.window[4:])

    def forward(self, x):
        self.calls += 1
        self.window.roll(1), self.recent.add_(float(self.calls))
        return self.head(self.body(self.norm(self.embed(x)))) * self.scale * self.wide.square().mean()


class Training:
    """A state in which everything moves at every step, each in its own way."""

    def __init__(self, kind):
        torch.manual_seed(0)
        self.net = Net(turned=kind != "lbfgs")  # which takes no other layout
        self.optimizer = OPTIMIZERS[kind](self.net.parameters())
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.ema = torch.optim.swa_utils.AveragedModel(
            self.net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
        )
        self.loader = Loader()
        memory = torch.zeros(12)
        self.plain = {
            "shared": memory, "view": memory[2:9], "strided": memory[::3], "scalar": torch.tensor(0.0),
            "array": np.zeros(5), "list": [0], "nested": {"deep": [torch.zeros(3), {"n": 0}]}, "bytes": bytearray(2),
        }  # fmt: skip
        self.state = {
            "model": self.net, "optimizer": self.optimizer, "scheduler": self.scheduler, "ema": self.ema,
            "loader": self.loader, "plain": self.plain, "rng": asyncckpt.RngState(),
            "alias": {"flat": self.net.body.weight.view(-1), "row": self.net.body.weight[0]},
        }  # fmt: skip

    def compute(self):
        """All that may happen between a save and the next step of the optimizer."""
        x = torch.randint(7, (4,))
        nn.functional.cross_entropy(self.net(x), x).backward()
        self.ema.update_parameters(self.net)
        plain, loader = self.plain, self.loader
        plain["shared"].add_(1), plain["view"].mul_(2), plain["scalar"].add_(1)
        plain["array"] += 1
        plain["list"].append(len(plain["list"]))
        plain["nested"]["deep"][0].add_(1)
        plain["nested"]["deep"][1]["n"] += 1
        plain["bytes"][0] += 1
        loader.position += 1
        loader.order[:] = np.roll(loader.order, 1)
        loader.history.append(loader.position)
        random.random(), np.random.rand(), torch.rand(1)

    def step(self):
        if isinstance(self.optimizer, torch.optim.LBFGS):
            self.optimizer.step(lambda: self.net(torch.arange(4)).square().sum())
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()


def recorded(state):
    return {name: dict(value) for name, value in frozen(state).items()}


def parts_that_differ(expected, loaded):
    loaded = {name: dict(value) for name, value in loaded.items()}
    return {name: found for name in expected if (found := difference(expected[name], loaded[name]))}


@pytest.mark.parametrize(
    ("overlap", "kind", "held"),
    [
        *((True, kind, True) for kind in OPTIMIZERS),
        *((True, kind, False) for kind in ("adamw", "fused")),
        *((overlap, kind, True) for overlap in (False, "auto") for kind in ("adamw", "fused")),
    ],
)
def test_no_later_change_leaks_into_a_checkpoint(overlap, kind, held, tmp_path):
    training = Training(kind)
    records = []
    with run(tmp_path, overlap=overlap) as ckpt:
        for number in range(5):
            expected = recorded(training.state)
            if held and number > 0:  # the first copy takes the arena's pages, and may do so while all goes on
                with copies_held(ckpt):
                    ckpt.save(number, training.state)
                    training.compute()
                    training.step()
            else:
                ckpt.save(number, training.state)
                training.compute()
                training.step()
            records.append(expected)
        ckpt.wait_until_flushed(PATIENCE)
    for first, second in itertools.pairwise(records):
        assert set(parts_that_differ(first, second)) == set(first), "a test in which nothing changes proves nothing"
    for number, expected in enumerate(records):
        assert parts_that_differ(expected, asyncckpt.load(tmp_path, number)) == {}


def test_the_first_copy_into_new_pages_is_as_safe(tmp_path):
    """What may change at once is copied aside; what changes in a step waits for the fence."""
    training = Training("fused")
    expected = recorded(training.state)
    with run(tmp_path, overlap=True) as ckpt, copies_held(ckpt):
        handle = ckpt.save(0, training.state)
        training.compute()
        assert not handle.wait_staged(0)
        training.step()
        handle.result(PATIENCE)
    assert parts_that_differ(expected, asyncckpt.load(tmp_path)) == {}


def test_a_snapshot_is_taken_when_save_is_called_though_it_has_to_wait_for_a_place(tmp_path):
    training = Training("adamw")
    records = []
    with run(tmp_path, overlap=True, max_in_flight=1) as ckpt:
        for number in range(5):
            records.append(recorded(training.state))
            ckpt.save(number, training.state)
            training.compute()
            training.step()
    for number, expected in enumerate(records):
        assert parts_that_differ(expected, asyncckpt.load(tmp_path, number)) == {}


def test_a_part_of_the_state_alone(tmp_path):
    training = Training("sgd")
    training.compute(), training.step()
    with run(tmp_path, overlap=True) as ckpt:
        for number, parts in enumerate([["model"], ["optimizer", "plain"], "loader", ["model"]]):
            expected = recorded(training.state)
            with copies_held(ckpt):
                handle = ckpt.save(number, training.state, parts=parts)
                training.compute()
                training.step()
            handle.result(PATIENCE)
            loaded = asyncckpt.load(tmp_path, number)
            wanted = [parts] if isinstance(parts, str) else parts
            assert parts_that_differ({name: expected[name] for name in wanted}, loaded) == {}
            assert list(loaded) == wanted


def test_the_writer_process_sees_the_same_bytes(tmp_path):
    training = Training("fused")
    records = []
    with asyncckpt.Checkpointer(tmp_path, overlap=True) as ckpt:
        for number in range(4):
            records.append(recorded(training.state))
            with copies_held(ckpt):
                ckpt.save(number, training.state)
                training.compute()
                training.step()
    for number, expected in enumerate(records):
        assert parts_that_differ(expected, asyncckpt.load(tmp_path, number)) == {}


def test_a_state_that_grows_and_shrinks(tmp_path):
    """Each save has its own layout, in arenas that were used for others."""
    generator = random.Random(0)
    records = []
    with run(tmp_path, overlap=True) as ckpt:
        for number in range(12):
            state = {"plain": {f"t{i}": torch.randn(generator.choice([0, 1, 300, 90000])) for i in range(number % 5)}}
            records.append(recorded(state))
            ckpt.save(number, state)
            for tensor in state["plain"].values():
                tensor.zero_()
    for number, expected in enumerate(records):
        assert parts_that_differ(expected, asyncckpt.load(tmp_path, number)) == {}
