"""Single tensors by name, and the files in the hands of the reference library."""

import numpy as np
import pytest
import torch
from safetensors import safe_open
from support.torch_states import difference, run
from torch import nn

import asyncckpt

CODED = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint16, torch.bool, torch.int8]
CODED += [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    memory = torch.randn(20)
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5), "norm": nn.BatchNorm1d(3)})
    model["head"].weight = model["embed"].weight
    model.register_buffer("phase", torch.randn(3, dtype=torch.complex64))
    plain = {
        "flat": memory[:8], "inner": memory[2:6], "left": memory[8:14], "right": memory[12:],
        "turned": torch.randn(3, 4).t(),
        "nested": [{"x": torch.ones(2)}, (torch.zeros(0), torch.tensor(7))], 3: torch.ones(3), "array": np.arange(4.0),
        "a.b": torch.ones(1), "a": {"b": torch.ones(2)},
        **{str(dtype): torch.ones(3).to(dtype) for dtype in CODED},
    }  # fmt: skip
    path = tmp_path_factory.mktemp("saved")
    with run(path) as ckpt:
        ckpt.save(0, {"model": model, "plain": plain, "number": 3})
    return path, model, plain


def test_every_tensor_of_a_module_can_be_loaded_by_its_name(saved):
    """Tied ones and those of dtypes that safetensors lacks, too."""
    path, model, _ = saved
    for name, value in model.state_dict().items():
        loaded = asyncckpt.load(path, parts=["model"], keys=[name])
        assert list(loaded) == ["model"]
        assert difference({name: value}, loaded["model"]) is None
    names = ["head.weight", "embed.weight", "head.bias"]
    loaded = asyncckpt.load(path, parts="model", keys=names)["model"]
    assert list(loaded) == names
    assert loaded["head.weight"].data_ptr() == loaded["embed.weight"].data_ptr()


@pytest.mark.parametrize(
    ("key", "find"),
    [
        ("flat", lambda p: p["flat"]),
        ("inner", lambda p: p["inner"]),
        ("left", lambda p: p["left"]),
        ("right", lambda p: p["right"]),
        ("turned", lambda p: p["turned"]),
        ("nested.0.x", lambda p: p["nested"][0]["x"]),
        ("nested.1.0", lambda p: p["nested"][1][0]),
        ("nested.1.1", lambda p: p["nested"][1][1]),
        ("3", lambda p: p[3]),
        ("array", lambda p: p["array"]),
        ("a.b", lambda p: p["a.b"]),
        ("a.b#2", lambda p: p["a"]["b"]),
    ],
)
def test_a_tensor_by_its_path(key, find, saved):
    path, _, plain = saved
    assert difference({key: find(plain)}, asyncckpt.load(path, parts=["plain"], keys=[key])["plain"]) is None


@pytest.mark.parametrize(("part", "key"), [("model", "head"), ("plain", "nested"), ("number", "x"), ("model", "")])
def test_names_of_nothing(part, key, saved):
    with pytest.raises(asyncckpt.CheckpointNotFoundError):
        asyncckpt.load(saved[0], parts=[part], keys=[key])


def test_keys_need_one_part(saved):
    for parts in (None, [], ["model", "plain"]):
        with pytest.raises(ValueError, match="one part"):
            asyncckpt.load(saved[0], parts=parts, keys=["x"])


def test_the_reference_library_reads_equal_tensors(saved):
    path, model, plain = saved
    folder = asyncckpt.open(path).path(0)
    with safe_open(folder / "model.safetensors", "pt") as file:
        read = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    state = model.state_dict()
    expected = {name: state[name] for name in state if name not in ("head.weight", "phase")}
    assert {
        name: difference(value, read[name]) for name, value in expected.items() if difference(value, read[name])
    } == {}
    assert set(read) == {*expected, "phase"}
    assert read["phase"].dtype == torch.uint8
    with safe_open(folder / "plain.safetensors", "pt") as file:
        for dtype in CODED:
            assert difference(plain[str(dtype)], file.get_tensor(str(dtype))) is None
        assert difference(plain["turned"], file.get_tensor("turned")) is None
