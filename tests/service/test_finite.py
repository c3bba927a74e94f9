"""`check_finite`: NaN and inf are found, named and recorded, in every floating dtype and wherever they stand."""

import logging
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import image_of
from support.processes import PATIENCE

import asyncckpt
from asyncckpt.format.image import Entry, header_size, parse_header
from asyncckpt.write.finite import LEAST, FiniteScan

DTYPES = {
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
WIDE = {torch.float8_e4m3fn: torch.float32, torch.float8_e5m2: torch.float32}


def patterns(dtype: torch.dtype) -> torch.Tensor:
    """Every bit pattern of a dtype of up to 16 bits; of a wider one, of its upper 16 bits with other bits below."""
    size = dtype.itemsize
    if size == 1:
        return torch.arange(256, dtype=torch.uint8).view(dtype)
    upper = torch.arange(1 << 16, dtype=torch.int64)
    if size == 2:
        return upper.to(torch.uint16).view(dtype)
    bits = torch.cat([upper << 8 * size - 16, (upper << 8 * size - 16) | 1, (upper << 8 * size - 16) | 0xFFFF])
    return (bits if size == 8 else bits.to(torch.uint32)).view(dtype)


@pytest.mark.parametrize("code", DTYPES)
def test_each_number_is_judged_as_torch_judges_it(code: str) -> None:
    values = patterns(DTYPES[code])
    finite = torch.isfinite(values.to(WIDE.get(values.dtype, values.dtype)))
    assert finite.any() and not finite.all()
    size = values.element_size()
    raw = memoryview(values.view(torch.uint8).numpy().tobytes())
    for some in (finite, ~finite):
        (where,) = some.nonzero(as_tuple=True)
        for i in where[:: max(1, len(where) // 300)].tolist():
            scan = FiniteScan({"x": Entry("x", code, (1,), 64, size)})
            scan.look(64, raw[i * size : (i + 1) * size])
            assert scan.found == ([] if finite[i] else ["x"]), values[i]
    good = memoryview(values[finite].view(torch.uint8).numpy().tobytes())
    scan = FiniteScan({"x": Entry("x", code, (len(good) // size,), 0, len(good))})
    scan.look(0, good)
    assert scan.found == []


NUMPY = st.sampled_from([np.float16, np.float32, np.float64, np.int32, np.uint8, np.bool_])
ARRAYS = st.lists(st.tuples(NUMPY, st.integers(0, 3000), st.booleans()), max_size=12)


@given(ARRAYS, st.integers(1, 5), st.randoms(use_true_random=False))
def test_those_and_only_those_are_named_however_the_image_is_cut(arrays, blocks, luck) -> None:
    """One bad number in a tensor, at any place; integers with the bits of NaN are no NaN."""
    made, bad = {}, set()
    for i, (kind, size, spoilt) in enumerate(arrays):
        array = made[f"t{i}"] = np.full(size, 3, kind)
        if kind in (np.int32, np.uint8):
            array.view(np.uint8)[:] = 0xFF
        elif spoilt and size and kind != np.bool_:
            array[luck.randrange(size)] = luck.choice([np.nan, np.inf, -np.inf, -np.nan])
            bad.add(f"t{i}")
    _, data = image_of(made)
    end = header_size(data[:8], len(data))
    scan = FiniteScan(parse_header(data[:end], len(data)))
    starts = list(range(0, len(data), 4096 * blocks))
    luck.shuffle(starts)
    for start in starts:
        scan.look(start, memoryview(data)[start : start + 4096 * blocks])
    assert set(scan.found) == bad


def save(ckpt, step, state):
    assert ckpt.save(step, state).result(PATIENCE) == "committed"


@pytest.fixture(params=["process", "thread"])
def run(tmp_path, request):
    """Opens a run of its own; its options are those of the Checkpointer."""
    return lambda **options: asyncckpt.Checkpointer(
        tmp_path / "run", **{"writer": request.param, "check_finite": True, **options}
    )


def told(caplog):
    return [r.getMessage() for r in caplog.records if "NaN or inf" in r.getMessage()]


def test_what_is_not_finite_is_named_and_recorded(run, caplog):
    caplog.set_level(logging.WARNING, "asyncckpt")
    big = torch.zeros(3 << 20)  # more than one chunk
    model = {"big": big, "count": torch.tensor(-1), "half": torch.ones(5, dtype=torch.bfloat16), "none": big[:0]}
    state = {"model": model, "note": {"loss": float("nan")}}
    with run() as ckpt:
        save(ckpt, 1, state)
        assert told(caplog) == []
        big[-1] = float("inf")
        model["half"][2] = float("nan")
        save(ckpt, 2, state)
        save(ckpt, 3, state)
        big[-1] = model["half"][2] = 0
        save(ckpt, 4, state)
        assert [r.finite for r in ckpt.records()] == [True, False, False, True]
    (message,) = told(caplog)
    assert "step 2" in message and "model: big, half" in message


def test_a_message_names_a_few_and_counts_the_rest(run, caplog):
    caplog.set_level(logging.WARNING, "asyncckpt")
    with run() as ckpt:
        save(ckpt, 1, {"a": [torch.tensor(float("nan")) for _ in range(9)], "b": torch.tensor([1.0, -float("inf")])})
    (message,) = told(caplog)
    assert "and 4 more" in message and "b: " in message


def test_the_newest_finite_checkpoint_stays(run):
    good, bad = {"x": torch.zeros(5)}, {"x": torch.full((5,), float("nan"))}
    with run(keep=asyncckpt.Keep(last=2)) as ckpt:
        for step, state in enumerate([good, good, bad, bad, bad]):
            save(ckpt, step, state)
    with run(keep=asyncckpt.Keep(last=2)) as ckpt:
        assert ckpt.steps() == [1, 3, 4]
        save(ckpt, 5, bad)
        ckpt.verify(1)
        save(ckpt, 6, bad)
    with run(keep=lambda records: [r.step for r in records]) as ckpt:
        save(ckpt, 7, bad)
    with run() as ckpt:
        assert ckpt.steps() == [1, 7]


def test_nobody_looks_unless_asked(run):
    with run(check_finite=False) as ckpt:
        save(ckpt, 1, {"x": torch.tensor(float("nan"))})
        assert ckpt.records()[0].finite is None
    with pytest.raises(ValueError, match="check_finite"):
        run(check_finite="model")


@pytest.mark.skipif(sys.platform != "linux", reason="maps are read from /proc")
def test_the_writer_loads_numpy_only_if_it_looks(tmp_path):
    for check in (False, True):
        with asyncckpt.Checkpointer(tmp_path / f"{check}", check_finite=check) as ckpt:
            save(ckpt, 1, {"x": torch.zeros(5)})
            with open(f"/proc/{ckpt.stats().writer_pid}/maps") as maps:
                assert ("_multiarray_umath" in maps.read()) is check


def test_every_dtype_is_known_or_no_float() -> None:
    assert LEAST.keys() == DTYPES.keys()
