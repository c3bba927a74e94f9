"""torch.distributed.checkpoint in one process, on the drop-ins: what it saves is an ordinary checkpoint."""

import io
import pickle
from collections import OrderedDict

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.torch_states import difference
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

import asyncckpt
from asyncckpt import errors
from asyncckpt.integrations.dcp import Reader, Stager, Writer

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


def equal(first, second):
    return difference(first, second) is None


def failed(call, *arguments, **options):
    """The error of the one rank that there is."""
    with pytest.raises(CheckpointException) as caught:
        call(*arguments, **options)
    return caught.value.failures[0][0]


def trained(seed):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(6, 5)).sum().backward()
    optimizer.step()
    return model, optimizer


def state(fill):
    return {
        "model": {"w": torch.full((5, 3), fill), "none": torch.empty(0, 3), "scalar": torch.tensor(fill)},
        "odd": {
            "complex": torch.full((3,), fill, dtype=torch.complex64),
            "wide": torch.full((2, 2), fill, dtype=torch.complex128),
            "narrow": torch.full((4,), fill).to(torch.float8_e4m3fnuz),
            "turned": torch.full((3, 2), fill).t(),
            "list": [torch.full((2,), fill), {"deep": torch.full((1,), fill)}],
        },
        "values": {"tuple": (1, "zwei", torch.full((2,), fill)), "list": [fill, None, b"x"], "dtype": torch.int8},
        "step": int(fill),
    }


def test_a_state_comes_back_and_is_an_ordinary_checkpoint(tmp_path):
    writer, reader = Writer(tmp_path), Reader(tmp_path)
    dcp.save(state(3.0), storage_writer=writer)
    loaded = state(0.0)
    dcp.load(loaded, storage_reader=reader)
    assert equal(loaded, state(3.0))
    assert equal(asyncckpt.load(tmp_path), state(3.0))
    assert (writer.step, reader.step, asyncckpt.open(tmp_path).verify()) == (1, 1, 1)
    assert equal(_load_state_dict_from_keys(storage_reader=Reader(tmp_path)), state(3.0))
    assert equal(
        _load_state_dict_from_keys({"model.w"}, storage_reader=reader)["model"], {"w": torch.full((5, 3), 3.0)}
    )


def test_modules_and_optimizers_go_both_ways_between_dcp_and_a_checkpointer(tmp_path):
    model, optimizer = trained(0)
    with asyncckpt.Checkpointer(tmp_path / "ours") as checkpointer:
        checkpointer.save(5, {"model": model, "optimizer": optimizer, "step": 5}).result()
    other, its = trained(1)
    loaded = {"model": other, "optimizer": its, "step": 0}
    dcp.load(loaded, storage_reader=Reader(tmp_path / "ours"))
    assert loaded["step"] == 5
    assert equal(other.state_dict(), model.state_dict())
    assert equal(its.state_dict(), optimizer.state_dict())
    dcp.save(loaded, storage_writer=Writer(tmp_path / "theirs", step=9))
    third, _ = trained(2)
    assert asyncckpt.restore(tmp_path / "theirs", {"model": third}, parts=["model"]) == 9
    assert equal(third.state_dict(), model.state_dict())


def test_a_bare_state_dict_is_one_part(tmp_path):
    model, _ = trained(0)
    dcp.save(model.state_dict(), storage_writer=Writer(tmp_path))
    dcp.save(model.state_dict(), storage_writer=Writer(tmp_path, part="model"))
    for reader, part in ((Reader(tmp_path, 1), "__root__"), (Reader(tmp_path, 2, part="model"), "model")):
        loaded = trained(1)[0].state_dict()
        dcp.load(loaded, storage_reader=reader)
        assert equal(dict(loaded), dict(model.state_dict()))
        assert list(asyncckpt.load(tmp_path, reader.step)) == [part]
    assert "model.0.weight" in Reader(tmp_path, 2).read_metadata().state_dict_metadata


def test_a_state_that_is_not_flattened_keeps_its_keys(tmp_path):
    whole = {"a": {"b": torch.ones(2), "c": [3]}, "t": torch.ones(3)}
    dcp.save(whole, storage_writer=Writer(tmp_path), planner=dcp.DefaultSavePlanner(flatten_state_dict=False))
    assert set(Reader(tmp_path).read_metadata().state_dict_metadata) == {"a", "t"}
    loaded = {"a": None, "t": torch.zeros(3)}
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    dcp.load(loaded, storage_reader=Reader(tmp_path), planner=planner)
    assert equal(loaded, whole)


def test_lists_with_holes_keep_their_keys(tmp_path):
    dcp.save({"a": [{}, {"x": torch.ones(1)}]}, storage_writer=Writer(tmp_path))
    assert list(Reader(tmp_path).read_metadata().state_dict_metadata) == ["a.1.x"]


def test_a_checkpoint_id_names_a_run_or_a_step_of_it(tmp_path):
    writer = Writer(tmp_path / "a")
    for place in (tmp_path / "b", tmp_path / "b/step-00000100", tmp_path / "b"):
        dcp.save({"x": 1}, storage_writer=writer, checkpoint_id=place)
    assert asyncckpt.open(tmp_path / "b").steps() == [1, 100, 101]
    reader = Reader(tmp_path / "a")
    dcp.load({"x": 0}, storage_reader=reader, checkpoint_id=tmp_path / "b/step-00000100")
    assert reader.step == 100


def test_tied_and_overlapping_tensors_are_read_as_they_were(tmp_path):
    base = torch.arange(12.0)
    saved = {"m": {"a": base, "b": base[3:9], "c": base.view(3, 4).t(), "tied": base}}
    with asyncckpt.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, saved).result()
    loaded = {"m": {name: torch.zeros(t.shape) for name, t in saved["m"].items()}}
    dcp.load(loaded, storage_reader=Reader(tmp_path))
    assert equal(loaded, {"m": {name: t.clone() for name, t in saved["m"].items()}})


def test_bytes_in_a_file_of_memory_come_back_as_one(tmp_path):
    dcp.save({"a": {"b": io.BytesIO(b"xyz"), "t": torch.ones(1)}}, storage_writer=Writer(tmp_path))
    loaded = {"a": {"b": io.BytesIO(), "t": torch.zeros(1)}}
    dcp.load(loaded, storage_reader=Reader(tmp_path))
    assert loaded["a"]["b"].read() == b"xyz"
    assert asyncckpt.load(tmp_path)["a"]["b"] == b"xyz"


def test_what_cannot_be_stored_without_pickle_is_named(tmp_path):
    error = failed(dcp.save, {"a": {"b": print}}, storage_writer=Writer(tmp_path))
    assert isinstance(error, errors.UnsupportedStateError)
    assert "a['b']" in str(error)
    error = failed(dcp.save, {"a": [(torch.nn.Linear(1, 1),)]}, storage_writer=Writer(tmp_path))
    assert isinstance(error, errors.UnsupportedStateError)
    assert asyncckpt.open(tmp_path).steps() == []
    dcp.save({"a": {"b": 1}}, storage_writer=Writer(tmp_path, lock_timeout=0))


def test_nothing_is_pickled(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("pickle")

    for module, names in (
        (pickle, ("dump", "dumps", "load", "loads", "Pickler", "Unpickler")),
        (torch, ("save", "load")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    dcp.save(state(3.0), storage_writer=Writer(tmp_path))
    loaded = state(0.0)
    dcp.load(loaded, storage_reader=Reader(tmp_path))
    assert equal(loaded, state(3.0))


class _Own(dcp.DefaultLoadPlanner):
    def load_bytes(self, read_item, value):
        raise AssertionError


def test_planners_that_want_pickles_are_refused_before_anything_changes(tmp_path):
    dcp.save({"a": {"t": torch.ones(2), "b": 1}}, storage_writer=Writer(tmp_path))
    loaded = {"a": {"t": torch.zeros(2), "b": 0}}
    assert isinstance(
        failed(dcp.load, loaded, storage_reader=Reader(tmp_path), planner=_Own()), errors.NotSupportedError
    )
    assert equal(loaded, {"a": {"t": torch.zeros(2), "b": 0}})


def test_what_is_not_there_is_said(tmp_path):
    assert isinstance(failed(dcp.load, {"a": 1}, storage_reader=Reader(tmp_path)), errors.CheckpointNotFoundError)
    dcp.save({"a": {"t": torch.ones(2)}}, storage_writer=Writer(tmp_path))
    for reader in (Reader(tmp_path, 7), Reader(tmp_path, 1, part="b"), Reader(tmp_path, part="b")):
        assert isinstance(failed(dcp.load, {"a": 1}, storage_reader=reader), errors.CheckpointNotFoundError)


def test_any_flipped_byte_is_found_before_a_tensor_changes(tmp_path):
    dcp.save(state(3.0), storage_writer=Writer(tmp_path))
    folder = asyncckpt.open(tmp_path).path(1)
    for file in [folder / "state.json", *sorted(folder.glob("*.safetensors"))]:
        good = file.read_bytes()
        for at in (0, len(good) // 2, len(good) - 1):
            bad = bytearray(good)
            bad[at] ^= 0x10
            file.write_bytes(bad)
            loaded = state(0.0)
            error = failed(dcp.load, loaded, storage_reader=Reader(tmp_path, 1))
            assert isinstance(error, errors.CorruptCheckpointError), (file, at)
            assert all(equal(loaded[part], state(0.0)[part]) for part in ("model", "odd"))
        file.write_bytes(good)


def test_a_run_that_another_owns_is_left_alone(tmp_path):
    with asyncckpt.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"x": {"t": torch.ones(1)}}).result()
        error = failed(dcp.save, state(1.0), storage_writer=Writer(tmp_path, lock_timeout=0.1))
        assert isinstance(error, errors.ConflictError)
    error = failed(dcp.save, state(1.0), storage_writer=Writer(tmp_path, 1))
    assert isinstance(error, errors.CheckpointExistsError)


def test_errors_pass_between_processes_as_they_are():
    made = [
        errors.UnsupportedStateError("u", path="a.b"),
        errors.CorruptCheckpointError("c", step=3, part="p", chunk=1),
        errors.StorageError("s", retryable=True, errno=28),
        errors.ConflictError("x", pid=4),
        errors.RankError("r", rank=2),
    ]
    for error in made:
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))


def test_a_large_tensor_goes_through_chunks(tmp_path):
    large = {"m": {"w": torch.arange(5 << 20, dtype=torch.float32).view(5, 1024, 1024), "s": torch.ones(3)}}
    dcp.save(large, storage_writer=Writer(tmp_path))
    loaded = {"m": {"w": torch.zeros(5, 1024, 1024), "s": torch.zeros(3)}}
    dcp.load(loaded, storage_reader=Reader(tmp_path))
    assert equal(loaded, large)


# Staging


def test_a_staged_state_does_not_follow_the_training(tmp_path):
    stager = Stager()
    live = {**state(3.0), "ordered": OrderedDict(a=torch.full((2,), 3.0)), "mutable": {"list": [3]}}
    live["again"] = {"w": live["model"]["w"]}
    staged = stager.stage(live)
    assert equal(staged["model"], state(3.0)["model"]) and equal(staged["odd"], state(3.0)["odd"])
    live["model"]["w"].zero_()
    live["mutable"]["list"].append(4)
    assert equal(staged["model"], state(3.0)["model"])
    assert staged["mutable"] == {"list": [3]}
    assert staged["again"]["w"] is staged["model"]["w"]
    assert staged["odd"]["turned"].stride() == live["odd"]["turned"].stride()
    stager.close()


def test_memory_is_used_again_once_the_save_is_over_and_never_before():
    stager = Stager()
    first = stager.stage({"t": torch.ones(5000)})
    kept = first["t"][10:20]
    place = first["t"].data_ptr()
    del first
    second = stager.stage({"t": torch.zeros(5000)})
    assert second["t"].data_ptr() != place and torch.equal(kept, torch.ones(10))
    del kept
    third = stager.stage({"t": torch.zeros(5000)})
    assert third["t"].data_ptr() == place
    stager.close()
    assert torch.equal(third["t"], torch.zeros(5000))
    with pytest.raises(errors.CheckpointError, match="closed"):
        stager.stage({})


def test_async_saves_are_of_the_moment_they_were_asked_for(tmp_path):
    stager = Stager()
    live = {"m": {"w": torch.zeros(100_000)}}
    answers = []
    for step in range(1, 5):
        live["m"]["w"].fill_(step)
        answers.append(dcp.async_save(live, storage_writer=Writer(tmp_path, step), async_stager=stager))
    live["m"]["w"].fill_(-1)
    for answer in answers:
        answer.result(60)
    for step in range(1, 5):
        assert torch.equal(asyncckpt.load(tmp_path, step)["m"]["w"], torch.full((100_000,), float(step)))
    stager.close()
