"""Exports: parts that are saved once more, cast. The very bits of a cast by torch, and never a resume from them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import train_step, training
from support.torch_states import copies_held, difference, run

import asyncckpt
from asyncckpt.errors import StateMismatchError, UnsupportedStateError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def cast(value: Any, to: torch.dtype) -> Any:
    """What an export of `value` is to hold."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(to) if value.dtype in FLOATING else value.detach()
    if isinstance(value, dict):
        return type(value)((key, cast(item, to)) for key, item in value.items())
    return [cast(item, to) for item in value] if isinstance(value, list) else value


def many_kinds(seed: int = 0) -> dict[str, Any]:
    """Tensors of many dtypes, sizes and layouts, with what casts treat in a way of its own."""
    generator = torch.Generator().manual_seed(seed)

    def some(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * 1e4).to(dtype)

    memory = some(64)
    return {
        **{f"small {dtype}": some(9, 7, dtype=dtype) for dtype in FLOATING},
        **{f"large {dtype}": some(300_001, dtype=dtype) for dtype in FLOATING},
        "huge": some(9_000_000),
        "turned": some(700, 300).t(),
        "every other": some(5000)[::2],
        "odd": torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e-40, 3.4e38, 65519.0, 65520.0]),
        "none": some(0, 5),
        "scalar": some(),
        "integers": torch.arange(7),
        "truths": torch.tensor([True, False]),
        "complex": torch.complex(some(3), some(3)),
        "eighth": some(8).to(torch.float8_e4m3fn),
        "whole": memory,
        "view": memory[3:20],
        "plain": [1, "two", None],
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("overlap", [True, False])
def test_an_export_holds_the_very_bits_of_a_cast(tmp_path: Path, dtype: str, overlap: bool) -> None:
    values = many_kinds()
    codec = "delta" if dtype == "fp16" else "raw"
    with run(tmp_path, export={"values": dtype}, overlap=overlap, codec=codec) as ckpt:
        for step in range(2):  # into fresh memory, and into memory that was there
            ckpt.save(step, {"values": values})
    name = f"values-{dtype}"
    for step in range(2):
        found = asyncckpt.load(tmp_path, step, parts=["values", name])
        assert difference(found["values"], values) is None
        assert difference(found[name], cast(values, DTYPES[dtype])) is None
    assert asyncckpt.open(tmp_path).verify() == 1


def test_any_safetensors_reader_opens_the_file_of_an_export(tmp_path: Path) -> None:
    state = training()
    with run(tmp_path, export={"model": "bf16"}) as ckpt:
        ckpt.save(1, state)
    found = safetensors.torch.load_file(asyncckpt.open(tmp_path).path(1) / "model-bf16.safetensors")
    assert difference(found, dict(cast(state["model"].state_dict(), torch.bfloat16))) is None


def test_tied_weights_are_one_tensor_in_an_export_too(tmp_path: Path) -> None:
    first, second = torch.nn.Embedding(50, 8), torch.nn.Linear(8, 50, bias=False)
    second.weight = first.weight
    with run(tmp_path, export={"model": "bf16"}) as ckpt:
        ckpt.save(1, {"model": torch.nn.ModuleDict({"first": first, "second": second})})
    found = asyncckpt.load(tmp_path, parts=["model-bf16"])["model-bf16"]
    assert found["first.weight"] is found["second.weight"]
    assert (asyncckpt.open(tmp_path).path(1) / "model-bf16.safetensors").stat().st_size == 4096 + 50 * 8 * 2


def test_an_export_holds_what_was_there_when_save_was_called(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.BatchNorm1d(300), torch.nn.Linear(300, 9))
    state = {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}
    with run(tmp_path, export={"model": "bf16"}, overlap=True) as ckpt:
        train_step(state)
        ckpt.save(0, state).result(30)
        for step in range(1, 4):
            expected = cast({k: v.clone() for k, v in state["model"].state_dict().items()}, torch.bfloat16)
            with copies_held(ckpt):
                handle = ckpt.save(step, state)
                assert not handle.wait_staged(0), "all was copied before save returned"
                train_step(state)
            handle.result(30)
            found = asyncckpt.load(tmp_path, step, parts=["model-bf16"])["model-bf16"]
            assert difference(dict(found), expected) is None


def test_a_change_behind_the_fence_tears_a_save_with_an_export(tmp_path: Path) -> None:
    state = training()
    with run(tmp_path, export={"model": "bf16"}, overlap=True, on_error="warn") as ckpt:
        ckpt.save(0, state).result(30)
        with copies_held(ckpt):
            handle = ckpt.save(1, state)
            state["model"][0].weight.data.mul_(2)
        with (
            pytest.warns(RuntimeWarning, match="changed while being copied"),
            pytest.raises(asyncckpt.TornSnapshotError),
        ):
            handle.result(30)


def test_a_changed_structure_is_seen_by_the_export(tmp_path: Path) -> None:
    state = training()
    with run(tmp_path, export={"model": "fp16"}) as ckpt:
        ckpt.save(0, state)
        state["model"].append(torch.nn.Linear(64, 3))
        ckpt.save(1, state)
    found = asyncckpt.load(tmp_path, parts=["model-fp16"])["model-fp16"]
    assert difference(dict(found), cast(dict(state["model"].state_dict()), torch.float16)) is None


def test_nothing_is_resumed_from_an_export(tmp_path: Path) -> None:
    state = training()
    with run(tmp_path, export={"model": "bf16"}) as ckpt:
        ckpt.save(1, state).result(30)
        before = [p.detach().clone() for p in state["model"].parameters()]
        for p in state["model"].parameters():
            p.data.zero_()
        assert ckpt.restore(state) == 1
        assert all(torch.equal(p, q) for p, q in zip(before, state["model"].parameters(), strict=True))
    assert list(asyncckpt.load(tmp_path)) == ["model", "optimizer", "rng"]
    assert asyncckpt.restore(tmp_path, state, strict=False) == 1
    with pytest.raises(StateMismatchError, match="model-bf16 of step 1 can't be restored"):
        asyncckpt.restore(tmp_path, {"model-bf16": state["model"]}, parts=["model-bf16"])
    with pytest.raises(StateMismatchError):
        asyncckpt.restore(tmp_path, {"model-bf16": state["model"]})
    (record,) = asyncckpt.open(tmp_path).records()
    assert record.exports == ("model-bf16",) and record.complete


def test_an_export_goes_with_its_part(tmp_path: Path) -> None:
    state = training()
    with run(tmp_path, export={"model": "bf16"}) as ckpt:
        ckpt.save(1, state, parts=["optimizer"])
        ckpt.save(2, state, parts=["model"])
    assert [r.parts for r in asyncckpt.open(tmp_path).records()] == [("optimizer",), ("model", "model-bf16")]


def test_a_cast_that_overflows_is_told_and_makes_no_checkpoint_unsound(tmp_path: Path, caplog: Any) -> None:
    with run(tmp_path, export={"model": "fp16"}, check_finite=True) as ckpt:
        ckpt.save(1, {"model": {"large": torch.tensor([1e6])}})
    assert [r.finite for r in asyncckpt.open(tmp_path).records()] == [True]
    assert "model-fp16: large" in caplog.text


@pytest.mark.parametrize(
    ("export", "error"),
    [({"model": "int8"}, ValueError), ({"model": torch.bfloat16}, ValueError), ({"../x": "bf16"}, ValueError),
     ({"x" * 63: "bf16"}, ValueError), (["model"], TypeError), ({1: "bf16"}, ValueError)],
)  # fmt: skip
def test_an_export_that_makes_no_sense_is_refused_at_once(tmp_path: Path, export: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="export="):
        run(tmp_path, export=export)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("export", "more"), [({"modle": "bf16"}, {}), ({"optimizer": "bf16"}, {}), ({"model": "bf16"}, {"Model-BF16": 1})]
)
def test_an_export_that_the_state_does_not_allow_is_refused_by_save(
    tmp_path: Path, export: dict[str, str], more: dict[str, Any]
) -> None:
    with run(tmp_path, export=export) as ckpt:
        with pytest.raises(UnsupportedStateError, match=next(iter(export))):
            ckpt.save(1, training() | more)
        assert ckpt.steps() == []


@settings(max_examples=15)
@given(st.lists(st.integers(0, 70_000), max_size=12), st.sampled_from(sorted(DTYPES)), st.data())
def test_any_mix_of_sizes_is_cast(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], dtype: str, data: Any
) -> None:
    kinds = [data.draw(st.sampled_from(FLOATING)) for _ in sizes]
    values = {str(i): torch.randn(n).to(kind) for i, n, kind in zip(itertools.count(), sizes, kinds, strict=False)}
    folder = tmp_path_factory.mktemp("run")
    with run(folder, export={"values": dtype}) as ckpt:
        ckpt.save(0, {"values": values})
    found = asyncckpt.load(folder, parts=[f"values-{dtype}"])[f"values-{dtype}"]
    assert difference(found, cast(values, DTYPES[dtype])) is None
