"""Every optimizer and scheduler of torch goes on after a restore as if nothing had happened, bit by bit."""

import pytest
import torch
from support.torch_states import difference, frozen, run
from torch import nn, optim
from torch.optim import lr_scheduler

import asyncckpt

OPTIMIZERS = {
    "SGD": {}, "SGD momentum": {"momentum": 0.9, "nesterov": True}, "SGD foreach": {"momentum": 0.9, "foreach": True},
    "SGD fused": {"momentum": 0.9, "fused": True},
    "Adam": {}, "Adam amsgrad": {"amsgrad": True}, "Adam foreach": {"foreach": True}, "Adam fused": {"fused": True},
    "AdamW": {}, "AdamW foreach": {"foreach": True}, "AdamW fused": {"fused": True},
    "AdamW maximize": {"maximize": True},
    "Adagrad": {}, "Adagrad fused": {"fused": True}, "RMSprop": {"momentum": 0.5, "centered": True},
    "LBFGS": {"max_iter": 3, "history_size": 2}, "NAdam": {}, "RAdam": {}, "Adamax": {}, "Adadelta": {}, "ASGD": {},
    "Rprop": {}, "Adafactor": {}, "Muon": {}, "SparseAdam": {},
}  # fmt: skip


def test_the_table_names_every_optimizer_of_torch():
    kinds = {name for name, kind in vars(optim).items() if isinstance(kind, type) and issubclass(kind, optim.Optimizer)}
    assert {name.split()[0] for name in OPTIMIZERS} == kinds - {"Optimizer"}


class Training:
    """A model, its optimizer, and steps whose data depend on nothing but their number."""

    def __init__(self, name="AdamW", seed=0, dtype=torch.float32, **options):
        kind = name.split()[0]
        torch.manual_seed(seed)
        if kind == "SparseAdam":
            self.model = nn.Sequential(nn.Embedding(7, 3, sparse=True))
        else:
            self.model = nn.Sequential(nn.Linear(3, 4, bias=kind != "Muon"), nn.Tanh(), nn.Linear(4, 2, bias=False))
        self.model.to(dtype)
        self.optimizer = getattr(optim, kind)(self.model.parameters(), lr=0.05, **OPTIMIZERS.get(name, {}), **options)
        self.state = {"model": self.model, "optimizer": self.optimizer}

    def step(self, number):
        data = torch.randn(5, 3, generator=torch.Generator().manual_seed(number))
        data = (
            data.to(self.model[0].weight.dtype)
            if self.model[0].weight.shape != (7, 3)
            else torch.arange(number % 5 + 1)
        )

        def loss():
            self.optimizer.zero_grad()
            result = self.model(data).square().sum()
            result.backward()
            return result

        if isinstance(self.optimizer, optim.LBFGS):
            self.optimizer.step(loss)
        else:
            loss()
            self.optimizer.step()


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_where_it_was(name, overlap, tmp_path):
    ours, twin = Training(name), Training(name, seed=1)
    with run(tmp_path, overlap=overlap, max_in_flight=8) as ckpt:
        recorded = []
        for number in range(4):
            recorded.append(frozen(ours.state))
            ckpt.save(number, ours.state)
            ours.step(number)
        recorded.append(frozen(ours.state))
    for number in range(4):
        loaded = asyncckpt.load(tmp_path, number)
        assert difference(recorded[number]["optimizer"], loaded["optimizer"]) is None
        assert difference(dict(recorded[number]["model"]), dict(loaded["model"])) is None
    twin.step(9)
    asyncckpt.restore(tmp_path, twin.state, 1)
    for number in range(1, 4):
        assert difference(recorded[number], frozen(twin.state)) is None
        twin.step(number)
    assert difference(recorded[4], frozen(twin.state)) is None


def test_an_optimizer_that_has_made_no_step(tmp_path):
    ours, twin = Training(), Training(seed=1)
    expected = frozen(ours.state)
    with run(tmp_path) as ckpt:
        ckpt.save(0, ours.state)
    twin.step(0)
    asyncckpt.restore(tmp_path, twin.state)
    assert difference(expected, frozen(twin.state)) is None
    assert twin.optimizer.state_dict()["state"] == {}


def test_groups_and_rates_are_those_of_the_save(tmp_path):
    ours = Training("Adam")
    recorded = []
    with run(tmp_path, overlap=True) as ckpt:
        for number in range(6):
            ours.optimizer.param_groups[0]["lr"] = 0.1 / (number + 1)
            if number == 3:
                extra = nn.Parameter(torch.randn(3))
                ours.optimizer.add_param_group({"params": [extra], "lr": 1.0, "weight_decay": 0.5})
            ours.step(number)
            recorded.append(frozen(ours.state))
            ckpt.save(number, ours.state)
        ckpt.wait_until_flushed()
        for number in (0, 2, 3, 5):
            assert difference(recorded[number]["optimizer"], asyncckpt.load(tmp_path, number)["optimizer"]) is None
        ours.optimizer.param_groups[0]["lr"] = 9.0
        ours.optimizer.param_groups[1]["weight_decay"] = 9.0
        assert ckpt.restore(ours.state) == 5
    assert difference(recorded[5], frozen(ours.state)) is None


def test_full_precision_state_of_half_parameters_stays_full(tmp_path):
    """torch's own `load_state_dict` would round it to the dtype of the parameter."""
    ours = Training("SGD momentum", dtype=torch.bfloat16)
    ours.step(0)
    for entry in ours.optimizer.state.values():
        entry["momentum_buffer"] = torch.randn(entry["momentum_buffer"].shape)
        entry["master"] = torch.randn(entry["momentum_buffer"].shape, dtype=torch.float64)
    expected = frozen(ours.state)
    with run(tmp_path) as ckpt:
        ckpt.save(0, ours.state).result(10)
        for entry in ours.optimizer.state.values():
            entry["momentum_buffer"].zero_(), entry["master"].zero_()
        ckpt.restore(ours.state)
    assert difference(expected, frozen(ours.state)) is None
    dtypes = {name: value.dtype for entry in ours.optimizer.state.values() for name, value in entry.items()}
    assert dtypes == {"momentum_buffer": torch.float32, "master": torch.float64}


def test_several_optimizers_over_one_model(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    state = {
        "model": model,
        "first": optim.Adam(model[0].parameters()),
        "second": optim.SGD(model[1].parameters(), 0.1, 0.9),
    }
    recorded = []
    with run(tmp_path, overlap=True, max_in_flight=9) as ckpt:
        for number in range(4):
            model(torch.randn(2, 3)).square().sum().backward()
            state["first"].step()
            state["second"].step()
            recorded.append(frozen(state))
            ckpt.save(number, state)
    for number, expected in enumerate(recorded):
        loaded = asyncckpt.load(tmp_path, number)
        assert difference({k: dict(v) for k, v in expected.items()}, {k: dict(v) for k, v in loaded.items()}) is None


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 7),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.LambdaLR(o, lambda e: 0.5**e)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: optim.swa_utils.SWALR(o, 0.01, 3),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_goes_on_where_it_was(name, tmp_path):
    def made(seed):
        training = Training("SGD momentum", seed)
        training.state["scheduler"] = SCHEDULERS[name](training.optimizer)
        return training

    def step(training, number):
        training.step(number)
        training.state["scheduler"].step(*[1.0] * (name == "ReduceLROnPlateau"))
        return training.optimizer.param_groups[0]["lr"]

    ours, twin = made(0), made(1)
    with run(tmp_path) as ckpt:
        for number in range(3):
            step(ours, number)
        ckpt.save(3, ours.state)
    asyncckpt.restore(tmp_path, twin.state)
    rates = [step(ours, number) for number in range(3, 9)]
    assert [step(twin, number) for number in range(3, 9)] == rates
    assert difference(frozen(ours.state), frozen(twin.state)) is None


def test_a_grad_scaler_goes_on_where_it_was(tmp_path):
    scaler, twin = (torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2) for scale in (8.0, 2.0))
    parameter = nn.Parameter(torch.ones(2))
    optimizer = optim.SGD([parameter], 0.1)
    for _ in range(3):
        scaler.scale(parameter.sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    with run(tmp_path) as ckpt:
        ckpt.save(0, {"scaler": scaler})
    asyncckpt.restore(tmp_path, {"scaler": twin})
    assert difference(scaler.state_dict(), twin.state_dict()) is None
    assert twin.get_scale() == 16.0
