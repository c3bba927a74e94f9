"""Every kind of tensor comes back bit by bit, or is refused by its path before anything is written."""

import json
import warnings

import numpy as np
import pytest
import torch
from support.torch_states import bits, difference, files, round_trip, run

import asyncckpt

REFUSED = "refused"
DTYPES = {
    "bool": "BOOL",
    "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64",
    "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64",
    "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "U8", "float8_e5m2fnuz": "U8", "float8_e8m0fnu": "U8", "float4_e2m1fn_x2": "U8",
    "complex32": "U8", "complex64": "U8", "complex128": "U8",
    **{f"{kind}{n}": "U8" for kind in ("uint", "int") for n in range(1, 8)},
    "bits1x8": "U8", "bits2x4": "U8", "bits4x2": "U8", "bits8": "U8", "bits16": "U8",
    "qint8": REFUSED, "quint8": REFUSED, "qint32": REFUSED, "quint4x2": REFUSED, "quint2x4": REFUSED,
}  # fmt: skip
"""Every torch dtype, and the safetensors dtype it is stored as. Those stored as U8 come back as themselves."""

STORED = [name for name, code in DTYPES.items() if code != REFUSED]


def all_bytes(dtype, count=48):
    """Items of `dtype` that take on every byte, NaN payloads, infinities and -0.0 among them."""
    raw = torch.randint(256, (count * dtype.itemsize,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    if dtype == torch.bool:
        return raw > 99
    if dtype.is_floating_point and dtype.itemsize > 1:
        special = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0, 0.0]).to(dtype)
        raw[: special.numel() * dtype.itemsize] = special.view(torch.uint8)
    return raw.view(dtype)


def zeros(dtype, shape):
    return torch.zeros(shape.numel() * dtype.itemsize, dtype=torch.uint8).view(dtype).view(shape)


@pytest.fixture(autouse=True)
def experimental_dtypes():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ComplexHalf|torch.quantize_per_tensor", UserWarning)
        yield


def test_the_table_names_every_dtype_of_torch():
    known = {str(v).removeprefix("torch.") for v in vars(torch).values() if isinstance(v, torch.dtype)}
    assert set(DTYPES) == known


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("prepared", [False, True])
def test_every_dtype_is_kept(prepared, overlap, tmp_path):
    state = {}
    for name in STORED:
        whole = all_bytes(getattr(torch, name)).reshape(6, 8)
        state[name] = {
            "whole": whole,
            "scalar": whole[1, 1].reshape(()),
            "empty": whole[:0],
            "transposed": whole.t(),
            "strided": all_bytes(whole.dtype).reshape(6, 8)[::2, 1::3],
        }
    with run(tmp_path, overlap=overlap) as ckpt:
        if prepared:
            ckpt.prepare({"part": state})
        ckpt.save(0, {"part": state})
        ckpt.wait_until_flushed()
        assert difference(state, asyncckpt.load(tmp_path)["part"]) is None
        blank = {name: {key: zeros(t.dtype, t.shape) for key, t in entry.items()} for name, entry in state.items()}
        assert ckpt.restore({"part": blank}) == 0
    assert difference(state, blank) is None


def test_the_table_says_how_each_dtype_is_stored(tmp_path):
    with run(tmp_path) as ckpt:
        ckpt.save(0, {"part": {name: all_bytes(getattr(torch, name)) for name in STORED}})
    data = (asyncckpt.open(tmp_path).path(0) / "part.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert {name: header[name]["dtype"] for name in STORED} == {name: DTYPES[name] for name in STORED}


def quantized(name):
    dtype = getattr(torch, name)
    if name in ("quint4x2", "quint2x4"):
        return torch.empty(8, dtype=torch.uint8).view(dtype)
    return torch.quantize_per_tensor(torch.ones(4), 0.5, 0, dtype)


class Labelled(torch.Tensor):
    pass


REFUSALS = {
    **{name: lambda name=name: quantized(name) for name, code in DTYPES.items() if code == REFUSED},
    "sparse": lambda: torch.eye(3).to_sparse(),
    "csr": lambda: torch.sparse_csr_tensor([0, 1], [0], [1.0], (1, 1)),
    "meta": lambda: torch.empty(3, device="meta"),
    "subclass": lambda: torch.ones(3).as_subclass(Labelled),
    "lazy": lambda: torch.nn.LazyLinear(3).weight,
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_what_is_more_than_strided_bytes_is_refused_by_its_path(kind, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(Sparse|sparse|beta|deprecated).*")
        value = REFUSALS[kind]()
    with run(tmp_path) as ckpt:
        before = files(tmp_path)
        with pytest.raises(asyncckpt.UnsupportedStateError) as refused:
            ckpt.save(0, {"good": torch.ones(3), "part": {"layers": [torch.ones(2), {"w": value}]}})
        assert refused.value.path == "part['layers'][1]['w']"
        assert "part['layers'][1]['w']" in str(refused.value)
        assert files(tmp_path) == before
        assert ckpt.stats().saves == 0


def test_layouts_keep_their_items_and_dense_ones_their_strides(tmp_path):
    base = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).reshape(2, 3, 4, 5)
    dense = {
        "channels_last": base.contiguous(memory_format=torch.channels_last),
        "permuted": base.permute(3, 1, 0, 2).clone(memory_format=torch.preserve_format),
        "transposed": torch.arange(12.0).reshape(3, 4).clone().t(),
    }
    others = {
        "strided": torch.arange(100.0)[3::7],
        "expanded": torch.arange(3.0).expand(4, 3),
        "expanded scalar": torch.tensor(2.0).expand(2, 2),
        "windows": torch.arange(10.0).unfold(0, 4, 2),
        "flipped": torch.arange(6.0).flip(0),
        "0-d": torch.tensor(3.5),
        "empty": torch.empty(0, 7),
        "empty strided": torch.empty(4, 0)[::2],
        "diagonal": torch.arange(9.0).reshape(3, 3).diagonal(),
    }
    state = dense | others
    loaded = round_trip(tmp_path, state)
    assert difference(state, loaded) is None
    assert {k: loaded[k].stride() for k in dense} == {k: t.stride() for k, t in dense.items()}


def test_lazy_conjugates_and_negatives_come_back_resolved(tmp_path):
    z = torch.view_as_complex(torch.arange(8.0).reshape(4, 2))
    state = {"conj": z.conj(), "neg": z.conj().imag, "both": (1j * z).conj().imag, "plain": z}
    assert state["conj"].is_conj() and state["neg"].is_neg()
    loaded = round_trip(tmp_path, state)
    assert difference(state, loaded) is None
    assert not loaded["conj"].is_conj() and not loaded["neg"].is_neg()


def relations(tensors):
    """Which bytes of which tensor are bytes of which other: what tells whether aliases are aliases again."""
    pairs = {}
    for a, first in tensors.items():
        for b, second in tensors.items():
            one = first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
            pairs[a, b] = second.data_ptr() - first.data_ptr() if one else None
    return pairs


def test_exact_aliases_are_stored_once_and_tied_again(tmp_path):
    w = torch.randn(1000)
    turned = torch.randn(3, 4).t()
    state = {"a": w, "b": w, "c": w.view(1000), "d": torch.nn.Parameter(w), "other": w.clone()}
    state |= {"turned": turned, "turned again": turned, "complex": turned * 1j}
    state["complex again"] = state["complex"]
    loaded = round_trip(tmp_path, state)
    assert difference(state, loaded) is None
    assert relations(loaded) == relations(state)
    assert (asyncckpt.open(tmp_path).path(0) / "part.safetensors").stat().st_size < 3 * 4000 + 4096


def test_tied_weights_of_a_module_are_tied_again(tmp_path):
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(5, 3), "head": torch.nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    loaded = round_trip(tmp_path, model)
    assert loaded["head.weight"].data_ptr() == loaded["embed.weight"].data_ptr()
    assert difference(model.state_dict()["embed.weight"], loaded["head.weight"]) is None


VIEWS = {
    "one inside the other": lambda x: {"all": x, "inner": x[10:20]},
    "reshaped": lambda x: {"flat": x, "square": x[:36].view(6, 6), "turned": x[:36].view(6, 6).t()},
    "chained": lambda x: {"a": x[:20], "b": x[10:30], "c": x[25:40]},
    "chained, not from the front": lambda x: {"a": x[3:20], "b": x[10:31]},
    "other dtype": lambda x: {"f": x, "i": x.view(torch.int32), "bytes": x[3:9].view(torch.uint8)},
    "wider inside narrower": lambda x: {"b": x.view(torch.uint8)[8:160], "d": x[2:38].view(torch.float64)},
    "strided over dense": lambda x: {"even": x[::2], "front": x[:10]},
    "expanded and base": lambda x: {"row": x[:4], "rows": x[:4].expand(3, 4)},
    "windows and base": lambda x: {"base": x[:10], "windows": x[:10].unfold(0, 4, 1)},
}


@pytest.mark.parametrize("kind", VIEWS)
def test_overlapping_views_share_their_memory_again(kind, tmp_path):
    state = VIEWS[kind](torch.randn(40))
    loaded = round_trip(tmp_path, state)
    assert difference(state, loaded) is None
    assert relations(loaded) == relations(state)


def test_views_of_one_memory_that_do_not_overlap_stand_alone(tmp_path):
    x = torch.randn(40)
    state = {"odd": x[1::2], "even": x[::2], "front": torch.zeros(10)[:5]}
    loaded = round_trip(tmp_path, state)
    assert difference(state, loaded) is None
    loaded["odd"].zero_()
    assert difference(state["even"], loaded["even"]) is None


@pytest.mark.parametrize("shift", range(0, 16, 3))
def test_views_of_unaligned_memory(shift, tmp_path):
    buffer = bytearray(400)
    start = torch.frombuffer(buffer, dtype=torch.uint8).data_ptr()
    x = torch.frombuffer(buffer, dtype=torch.float32, offset=(shift - start) % 16, count=40)
    x.copy_(torch.randn(40))
    state = {"a": x[1:10], "b": x[5:15], "c": x[30:]}
    assert difference(state, round_trip(tmp_path, state)) is None


def test_one_memory_behind_two_storages(tmp_path):
    array = np.arange(20, dtype=np.float32)
    state = {"a": torch.from_numpy(array), "b": torch.from_numpy(array)[5:], "c": torch.from_numpy(array[:7])}
    assert difference(state, round_trip(tmp_path, state)) is None


def test_restored_tensors_keep_what_is_not_theirs(tmp_path):
    """`requires_grad` belongs to the live tensor, and so does being an inference tensor."""
    with torch.inference_mode():
        inference = torch.arange(4.0)
        model = torch.nn.Linear(2, 2)
    leaf = torch.ones(3, requires_grad=True)
    state = {"part": {"leaf": leaf, "inference": inference, "result": leaf * 2}, "model": model}
    before = {name: bits(t) for name, t in state["part"].items()}
    with run(tmp_path, overlap=True) as ckpt:
        ckpt.save(0, state)
        weight = bits(model.weight)
        with torch.no_grad(), torch.inference_mode():
            leaf.zero_(), inference.zero_(), model.weight.zero_()
        assert ckpt.restore(state) == 0
    assert bits(model.weight) == weight
    assert {name: bits(t) for name, t in state["part"].items()} == before
    assert leaf.requires_grad and leaf.is_leaf
    assert inference.is_inference()
    assert not asyncckpt.load(tmp_path)["part"]["leaf"].requires_grad


def test_large_tensors_are_copied_whole(tmp_path):
    """Beyond the size of one slice of the copy and of several chunks of the file, contiguous and not."""
    state = {"slices": torch.randn((17 << 20) // 4 + 1), "turned": torch.randn(1500, 1111).t(), "tail": torch.ones(1)}
    assert difference(state, round_trip(tmp_path, state)) is None


@pytest.mark.parametrize("overlap", [False, True])
def test_many_small_tensors_between_large_and_strided_ones(overlap, tmp_path):
    """What lies side by side is copied together, and nothing but that."""
    kinds = [torch.float32, torch.int64, torch.bfloat16, torch.uint8, torch.complex64]
    state = {}
    for i in range(9000):
        kind = kinds[0] if i < 4500 else kinds[i % 5]
        state[str(i)] = torch.arange(i, i + 8 + 2 * (i % 3)).to(kind)
        if kind == torch.float32 and i % 97 == 0:
            state[str(i)] = state[str(i)].reshape(2, -1).t()
        if i % 1000 == 0:
            state[f"large {i}"] = torch.arange(i, i + 20_000.0)
    loaded = round_trip(tmp_path, state, overlap=overlap)
    assert difference(state, loaded) is None
