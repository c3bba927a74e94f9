"""A part as one safetensors file: the bits that torch's cast gives, whole or absent, verified, in bounded memory."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import Part, commit, flip
from support.models import training
from support.shards import commit_in_shards
from support.torch_states import bits, damage, run

import asyncckpt
from asyncckpt.catalog.catalog import Catalog
from asyncckpt.errors import (
    CheckpointError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    StorageError,
)
from asyncckpt.format import names
from asyncckpt.read.cast import CASTABLE, cast
from asyncckpt.read.export import DTYPES, export
from asyncckpt.read.reader import CheckpointReader
from asyncckpt.storage.local import LocalStorage

TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def exported(directory: Path, part: str = "model", dtype: str | None = None, step: int = 1) -> dict[str, torch.Tensor]:
    """The tensors of the file that an export makes, as the reference reader gives them."""
    target = directory.parent / f"out-{part}-{dtype}.safetensors"
    with CheckpointReader(Catalog(LocalStorage(str(directory))), step) as reader:
        export(reader, part, target, dtype, overwrite=True)
    assert oct(target.stat().st_mode & 0o777) == "0o600"
    with safetensors.safe_open(target, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    return safetensors.torch.load_file(target)


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equal in dtype, shape and every bit; but any NaN is as good as another."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    if first.dtype.is_floating_point and first.dtype.itemsize > 1:
        nan = torch.isnan(first)
        if not torch.equal(nan, torch.isnan(second)):
            return False
        first, second = first.masked_fill(nan, 0), second.masked_fill(nan, 0)
    return bits(first) == bits(second)


def patterns(code: str) -> torch.Tensor:
    """Every bit pattern of a dtype of 16 bits; of a wider one, all upper halves, with halves and near halves below."""
    dtype = TORCH[code]
    upper = torch.arange(1 << 16, dtype=torch.int64)
    if dtype.itemsize == 2:
        return upper.to(torch.int32).to(torch.uint16).view(dtype)
    if dtype.itemsize == 4:
        lower = [0, 1, 0x7FFF, 0x8000, 0x8001, 0x1000, 0x0FFF, 0x1001, 0xFFFF]
        return torch.cat([(upper << 16) | low for low in lower]).to(torch.uint32).view(dtype)
    lower = [0, 1, 1 << 28, (1 << 28) + 1, (1 << 28) - 1, 1 << 44, 1 << 41, (1 << 48) - 1]
    return torch.cat([(upper << 48) | low for low in lower]).view(dtype)


@pytest.mark.parametrize("target", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("source", CASTABLE)
def test_each_number_is_rounded_as_torch_rounds_it(source: str, target: str) -> None:
    values = patterns(source)
    raw = memoryview(values.view(torch.uint8).numpy())
    found = torch.frombuffer(bytearray(cast(raw, source, target)), dtype=TORCH[target])
    assert same(found, values.to(TORCH[target]))


@given(st.lists(st.floats(width=64), max_size=50), st.sampled_from(CASTABLE), st.sampled_from(["BF16", "F16", "F32"]))
def test_any_numbers_are(numbers: list[float], source: str, target: str) -> None:
    values = torch.tensor(numbers, dtype=torch.float64).to(TORCH[source])
    raw = memoryview(values.view(torch.uint8).numpy().tobytes())
    found = torch.frombuffer(bytearray(cast(raw, source, target)) or bytearray(8), dtype=TORCH[target])[: len(numbers)]
    assert same(found, values.to(TORCH[target]))


def many_kinds() -> dict[str, Any]:
    memory = torch.randn(60)
    return {
        **{f"of {code}": torch.randn(31, 7).to(dtype) for code, dtype in TORCH.items()},
        "over chunks": torch.randn(5_000_000),
        "turned": torch.randn(40, 30).t(),
        "none": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
        "count": torch.tensor(7),
        "truths": torch.tensor([True, False]),
        "eighth": torch.randn(9).to(torch.float8_e5m2),
        "whole": memory,
        "row": memory[10:20],
        "every third": memory[::3],
        "again": memory,
        "nested": [{"deep": (torch.ones(2), 5)}, {3: torch.zeros(1)}],
        "array": np.arange(6, dtype=np.float32).reshape(2, 3),
        "text": "not a tensor",
    }


def flat(value: Any, path: str = "") -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor | np.ndarray):
        return {path: torch.as_tensor(value)}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {k: v for key, item in items for k, v in flat(item, f"{path}.{key}" if path else str(key)).items()}


@pytest.mark.parametrize(("dtype", "codec"), [(None, "raw"), ("bf16", "zstd"), ("fp16", "raw"), ("fp32", "delta")])
def test_a_file_has_every_tensor_under_its_path_and_floating_ones_cast(
    tmp_path: Path, dtype: str | None, codec: Any
) -> None:
    values = many_kinds()
    with run(tmp_path / "run", codec=codec) as ckpt:
        ckpt.save(0, {"model": values}).result(60)
        ckpt.save(1, {"model": values})
    found = exported(tmp_path / "run", dtype=dtype)
    expected = flat(values)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        castable = dtype is not None and tensor.dtype in TORCH.values() and name != "array"
        assert same(found[name], tensor.to(TORCH[DTYPES[dtype]]) if castable and dtype else tensor), name


@pytest.mark.parametrize("codec", ["zstd", "delta"])
def test_a_coded_checkpoint_is_exported_as_a_raw_one(tmp_path: Path, codec: Any) -> None:
    values = many_kinds() | {"large": torch.randn(300_000)}
    for name, options in (("raw", {}), (codec, {"codec": codec})):
        with run(tmp_path / name, **options) as ckpt:
            ckpt.save(1, {"model": values})
            ckpt.save(2, {"model": values | {"scalar": torch.tensor(3.5)}})
    coded, raw = exported(tmp_path / codec), exported(tmp_path / "raw")
    assert coded.keys() == raw.keys() and all(same(coded[key], raw[key]) for key in raw)
    assert not list((tmp_path / codec).rglob("*.safetensors"))


def test_a_module_can_load_what_was_exported_of_it(tmp_path: Path) -> None:
    """Tied weights, too, though a checkpoint stores them once."""
    first, second = torch.nn.Embedding(50, 8), torch.nn.Linear(8, 50, bias=False)
    second.weight = first.weight
    model = torch.nn.ModuleDict({"first": first, "second": second, "norm": torch.nn.BatchNorm1d(3)})
    with run(tmp_path / "run") as ckpt:
        ckpt.save(1, {"model": model})
    found = exported(tmp_path / "run", dtype="bf16")
    model.bfloat16().load_state_dict(found, strict=True)
    assert same(found["second.weight"], first.weight.detach())


def test_an_export_of_the_training_and_one_made_later_are_the_same(tmp_path: Path) -> None:
    state = training()
    with run(tmp_path / "run", export={"model": "bf16"}) as ckpt:
        ckpt.save(1, state)
    later, then = exported(tmp_path / "run", dtype="bf16"), exported(tmp_path / "run", "model-bf16")
    assert later.keys() == then.keys() and all(same(later[name], then[name]) for name in then)


@pytest.mark.parametrize("chunk_size", [4096, 5000, 4099, 1 << 20])
def test_chunks_of_any_size_are_read(tmp_path: Path, chunk_size: int) -> None:
    """Items may then lie across two of them."""
    arrays = {"a": np.random.default_rng(0).normal(size=3000), "b": np.arange(5000, dtype=np.float32)}
    tree = {name: {"$": "tensor", "n": name} for name in arrays}
    commit(LocalStorage(str(tmp_path / "run")), 1, {"model": Part(arrays, tree)}, chunk_size=chunk_size)
    found = exported(tmp_path / "run", dtype="fp16")
    assert all(same(found[name], torch.from_numpy(array).to(torch.float16)) for name, array in arrays.items())


@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_what_several_ranks_saved_is_put_together(tmp_path: Path, dtype: str | None) -> None:
    whole = np.random.default_rng(0).normal(size=(60, 70)).astype(np.float32)
    cuts = [((0, 0), (60, 30)), ((0, 30), (25, 40)), ((25, 30), (35, 40))]
    commit_in_shards(tmp_path / "run", whole, cuts)
    found = exported(tmp_path / "run", dtype=dtype)
    assert found.keys() == {"w"} and same(found["w"], torch.from_numpy(whole).to(torch.bfloat16 if dtype else None))
    damage_of(tmp_path / "run", 2)
    with pytest.raises(CorruptCheckpointError):
        exported(tmp_path / "run")


def damage_of(directory: Path, rank: int) -> None:
    """Flip the last byte of the image of one rank."""
    path = asyncckpt.open(directory).path(1) / names.image_file("model", rank)
    flip(path, path.stat().st_size - 1)


def test_memory_is_bounded(tmp_path: Path) -> None:
    """A part of 200 MB, in a process that may take 120 MB more than it has."""
    with run(tmp_path / "run") as ckpt:
        ckpt.save(1, {"model": {"one": torch.zeros(30_000_000), "two": torch.ones(20_000_000)}})
    code = """if True:
        import resource, sys
        from pathlib import Path
        from asyncckpt.catalog.catalog import Catalog
        from asyncckpt.read.export import export
        from asyncckpt.read.reader import CheckpointReader
        from asyncckpt.storage.local import LocalStorage
        assert "torch" not in sys.modules
        def private():
            fields = dict(line.split(":") for line in open("/proc/self/status") if ":" in line)
            return int(fields["VmHWM"].split()[0]) - int(fields["RssFile"].split()[0])
        with CheckpointReader(Catalog(LocalStorage(sys.argv[1])), 1) as reader:
            before = private()
            export(reader, "model", Path(sys.argv[2]), "bf16")
        print(private() - before)
    """
    target = tmp_path / "out.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "run", target], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 120 << 20
    assert target.stat().st_size > 100_000_000


def test_nothing_is_left_of_an_export_that_fails(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    with run(tmp_path / "run") as ckpt:
        ckpt.save(1, {"model": {"x": torch.ones(3_000_000)}, "note": {"y": 1}})
    catalog = Catalog(LocalStorage(str(tmp_path / "run")))
    with CheckpointReader(catalog, 1) as reader:
        with pytest.raises(CheckpointNotFoundError, match="no part 'ema'"):
            export(reader, "ema", folder / "x.safetensors")
        with pytest.raises(CheckpointNotFoundError, match="no tensors"):
            export(reader, "note", folder / "x.safetensors")
        with pytest.raises(StorageError) as failed:
            export(reader, "model", tmp_path / "not there" / "x.safetensors")
        assert failed.value.errno == errno.ENOENT
        damage(tmp_path / "run", 1)
        with pytest.raises(CorruptCheckpointError, match="chunk 1"):
            export(reader, "model", folder / "x.safetensors")
    assert os.listdir(folder) == []


def test_a_file_that_is_there_stays_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    target = tmp_path / "x.safetensors"
    target.write_bytes(b"mine")
    with run(tmp_path / "run") as ckpt:
        ckpt.save(1, {"model": {"x": torch.ones(3)}})
    with CheckpointReader(Catalog(LocalStorage(str(tmp_path / "run"))), 1) as reader:
        with pytest.raises(CheckpointExistsError):
            export(reader, "model", target)
        assert target.read_bytes() == b"mine"
        export(reader, "model", target, overwrite=True)
    assert safetensors.torch.load_file(target)["x"].tolist() == [1, 1, 1]


def test_what_safetensors_has_no_word_for_is_told(tmp_path: Path) -> None:
    memory = torch.zeros(4, dtype=torch.complex64)
    with run(tmp_path / "run") as ckpt:
        ckpt.save(1, {"model": {"alone": memory.clone()}, "shared": {"whole": memory, "part": memory[1:]}})
    assert exported(tmp_path / "run")["alone"].dtype == torch.uint8
    with pytest.raises(CheckpointError, match="complex64"):
        exported(tmp_path / "run", "shared")


def node(**members: Any) -> dict[str, Any]:
    return {"$": "tensor", "n": "x", **members}


@pytest.mark.parametrize(
    "tree",
    [
        {"a": {"$": "tensor"}}, {"a": {"$": "tensor", "n": "y"}}, {"a": {"$": "tensor", "n": ["x"]}}, {"$": "module"},
        {"$": "tuple", "v": 5}, {"$": "dict", "v": [[1]]}, {"a": node(o=0)},
        {"a": node(o=0, d="float32", s=[9], st=[1])}, {"a": node(o=-4, d="float32", s=[1], st=[1])},
        {"a": node(o=8, d="float32", s=[7], st=[1])}, {"a": node(o=0, d="float32", s=[2], st=[-1])},
        {"a": node(o=0, d="float32", s=[2, 2], st=[1])}, {"a": node(o="0", d="float32", s=[1], st=[1])},
        {"a": node(o=0, d="float32", s=[1 << 70], st=[0])}, {"a": node(o=0, d="float64", s=[3, 1 << 40], st=[1, 0])},
    ],
)  # fmt: skip
def test_a_hostile_tree_is_refused_and_takes_no_memory(tmp_path: Path, tree: Any) -> None:
    arrays = {"x": np.arange(8, dtype=np.float32)}
    commit(LocalStorage(str(tmp_path / "run")), 1, {"model": Part(arrays, tree)})
    with pytest.raises(CheckpointError) as refused:
        exported(tmp_path / "run")
    assert not isinstance(refused.value, StorageError), "it was tried"
    assert not list(tmp_path.glob("*.safetensors")) and not list(tmp_path.glob(".*"))


def test_the_load_of_a_file_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    state = training()
    with run(tmp_path / "run") as ckpt:
        ckpt.save(1, state)
    loaded = asyncckpt.load(tmp_path / "run", parts=["model"])["model"]
    found = exported(tmp_path / "run")
    assert found.keys() == loaded.keys() and all(same(found[name], loaded[name]) for name in loaded)
