"""`import` and `export`: other formats to checkpoints and back, exact, whole or not at all, and in bounded memory."""

import json
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from support.torch_states import difference

import asyncckpt
from asyncckpt.cli.answers import CORRUPT, NOT_FOUND, OK, OTHER, USAGE

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


def weights():
    torch.manual_seed(0)
    return {
        "embed.weight": torch.randn(50, 20),
        "head.weight": torch.randn(20, 3).to(torch.bfloat16),
        "head.bias": torch.randn(3),
        "none": torch.empty(0, 2),
        "steps": torch.tensor(7),
    }


def state():
    shared = torch.arange(12.0)
    return {
        "model": OrderedDict(weights()),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0), "m": torch.randn(5, 4).t()}}, "groups": [{"lr": 1e-3}]},
        "tied": {"a": shared, "b": shared, "part": shared[2:5], "odd": torch.ones(3, dtype=torch.complex128)},
        "epoch": 4,
    }


def same(first, second):
    assert difference(first, second) is None


def test_a_safetensors_file_becomes_a_part_and_comes_out_again(tmp_path, cli):
    safetensors.torch.save_file(weights(), tmp_path / "in.safetensors")
    answer = cli("import", tmp_path / "in.safetensors", tmp_path / "run", "--json")
    assert (answer.code, answer.json["step"], answer.json["tensors"]) == (OK, 1, 5)
    loaded = asyncckpt.load(tmp_path / "run")["model"]
    assert loaded.keys() == weights().keys()
    same({name: loaded[name] for name in weights()}, weights())
    assert cli("verify", tmp_path / "run").code == OK
    assert cli("export", tmp_path / "run", tmp_path / "out.safetensors").code == OK
    found = safetensors.torch.load_file(tmp_path / "out.safetensors")
    same({name: found[name] for name in weights()}, weights())


def test_a_module_is_restored_from_an_import(tmp_path, cli):
    torch.manual_seed(1)
    model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "in.safetensors")
    assert cli("import", tmp_path / "in.safetensors", f"{tmp_path}/run@40").code == OK
    assert asyncckpt.restore(tmp_path / "run", {"model": other}) == 40
    same(dict(other.state_dict()), dict(model.state_dict()))


def test_files_with_an_index_go_both_ways(tmp_path, cli):
    safetensors.torch.save_file(weights(), tmp_path / "in.safetensors")
    assert cli("import", tmp_path / "in.safetensors", tmp_path / "run").code == OK
    answer = cli("export", tmp_path / "run", tmp_path / "hub", "--max-shard-size", "1kB", "--json")
    assert (answer.code, answer.json["files"] > 1) == (OK, True)
    files = sorted(path.name for path in (tmp_path / "hub").iterdir())
    assert "model.safetensors.index.json" in files
    assert f"model-00001-of-{len(files) - 1:05d}.safetensors" in files
    found = {}
    for path in (tmp_path / "hub").glob("*.safetensors"):
        found |= safetensors.torch.load_file(path)
    same({name: found[name] for name in weights()}, weights())
    assert cli("import", tmp_path / "hub", tmp_path / "again").code == OK
    loaded = asyncckpt.load(tmp_path / "again")["model"]
    same({name: loaded[name] for name in weights()}, weights())
    assert cli("export", tmp_path / "run", tmp_path / "hub", "--max-shard-size", "1kB").code == USAGE
    assert cli("export", tmp_path / "run", tmp_path / "hub", "--max-shard-size", "1kB", "--overwrite").code == OK
    assert cli("export", tmp_path / "run", tmp_path / "one", "--max-shard-size", "1GB").code == OK
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("kind", ["torch", "dcp"])
def test_pickled_formats_go_both_ways(tmp_path, cli, kind):
    with asyncckpt.Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(3, state()).result()
    target = tmp_path / "out"
    assert cli("export", tmp_path / "run", target, "--format", kind).code == OK
    saved = asyncckpt.load(tmp_path / "run")
    if kind == "torch":
        same(torch.load(target, weights_only=True), saved)
    refused = cli("import", target, tmp_path / "again")
    assert (refused.code, "--allow-pickle" in refused.err) == (USAGE, True)
    assert not (tmp_path / "again").exists()
    assert cli("import", target, tmp_path / "again", "--allow-pickle").code == OK
    loaded = asyncckpt.load(tmp_path / "again")
    if kind == "torch":
        same(loaded, saved)
        assert loaded["tied"]["a"] is loaded["tied"]["b"]
    else:  # DCP itself flattens: keys become text, and dicts plain
        assert list(loaded) == list(saved)
        assert loaded["epoch"] == 4 and loaded["optimizer"]["groups"] == [{"lr": 1e-3}]
        same(loaded["model"], dict(saved["model"]))
        same(loaded["optimizer"]["state"]["0"]["m"], saved["optimizer"]["state"][0]["m"])
        same(loaded["tied"], {name: tensor.clone() for name, tensor in saved["tied"].items()})
    assert cli("verify", tmp_path / "again").code == OK


def test_one_part_is_exported_as_it_is(tmp_path, cli):
    with asyncckpt.Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(3, state()).result()
    assert cli("export", tmp_path / "run", tmp_path / "model.pt", "--format", "torch", "--part", "model").code == OK
    same(torch.load(tmp_path / "model.pt", weights_only=True), asyncckpt.load(tmp_path / "run")["model"])
    assert cli("import", tmp_path / "model.pt", tmp_path / "again", "--allow-pickle").code == OK
    same(asyncckpt.load(tmp_path / "again")["model"], asyncckpt.load(tmp_path / "run")["model"])
    assert cli("export", tmp_path / "run", tmp_path / "model.pt", "--format", "torch").code == USAGE


def test_what_several_ranks_of_dcp_have_written_is_put_together(tmp_path, cli):
    whole = torch.arange(24.0).view(6, 4)
    pieces = [{"model": {"w": whole[:2]}}, {"model": {"w": whole[2:]}}]
    folder = tmp_path / "dcp"
    metadata = None
    for number, piece in enumerate(pieces):
        dcp.save(piece, checkpoint_id=tmp_path / str(number), no_dist=True)
    folder.mkdir()
    for number, start in enumerate((0, 2)):
        found = dcp.FileSystemReader(tmp_path / str(number)).read_metadata()
        [(index, place)] = found.storage_data.items()
        os.rename(tmp_path / str(number) / place.relative_path, folder / f"__{number}_0.distcp")
        place.relative_path = f"__{number}_0.distcp"
        about = found.state_dict_metadata["model.w"]
        about.chunks[0].offsets = torch.Size((start, 0))
        about.size = whole.size()
        moved = type(index)("model.w", torch.Size((start, 0)))
        if metadata is None:
            metadata = found
            metadata.storage_data = {moved: place}
        else:
            metadata.storage_data[moved] = place
            metadata.state_dict_metadata["model.w"].chunks += about.chunks
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    assert cli("import", folder, tmp_path / "run", "--allow-pickle").code == OK
    same(asyncckpt.load(tmp_path / "run"), {"model": {"w": whole}})
    del metadata.state_dict_metadata["model.w"].chunks[1]
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    assert cli("import", folder, tmp_path / "run", "--allow-pickle").code == CORRUPT
    assert asyncckpt.open(tmp_path / "run").steps() == [1]


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path, cli):
    mark = tmp_path / "ran"
    torch.save({"model": {"w": torch.ones(2)}, "x": Evil(mark)}, tmp_path / "evil.pt")
    answer = cli("import", tmp_path / "evil.pt", tmp_path / "run", "--allow-pickle")
    assert answer.code == OTHER
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp/.metadata").write_bytes(pickle.dumps(Evil(mark)))
    answer = cli("import", tmp_path / "dcp", tmp_path / "run", "--allow-pickle")
    assert (answer.code, "names" in answer.err) == (OTHER, True)
    dcp.save({"model": {"w": torch.ones(2), "x": Evil(mark)}}, checkpoint_id=tmp_path / "dcp2")
    mark.unlink(missing_ok=True)
    assert cli("import", tmp_path / "dcp2", tmp_path / "run", "--allow-pickle").code == OTHER
    assert not mark.exists()
    assert asyncckpt.open(tmp_path / "run").steps() == []


def test_what_is_damaged_or_absent_is_said_and_nothing_is_committed(tmp_path, cli):
    run = tmp_path / "run"
    assert cli("import", tmp_path / "no", run).code == NOT_FOUND
    safetensors.torch.save_file(weights(), tmp_path / "in.safetensors")
    whole = (tmp_path / "in.safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(whole[:-1])
    assert cli("import", tmp_path / "short.safetensors", run).code == CORRUPT
    (tmp_path / "bad.pt").write_bytes(b"nonsense" * 100)
    assert cli("import", tmp_path / "bad.pt", run, "--allow-pickle").code in (CORRUPT, OTHER)
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "model.safetensors.index.json").write_text('{"weight_map": {"w": "../in.safetensors"}}')
    assert cli("import", hub, run).code == CORRUPT
    (hub / "model.safetensors.index.json").write_text('{"weight_map": {"w": "a.safetensors"}}')
    assert cli("import", hub, run).code == NOT_FOUND
    for words in (("--format", "zip"), ("--part", "a/b")):
        assert cli("import", tmp_path / "in.safetensors", run, *words).code == USAGE
    assert not run.exists() or asyncckpt.open(run).steps() == []
    assert cli("import", tmp_path / "in.safetensors", f"{run}@5").code == OK
    assert cli("import", tmp_path / "in.safetensors", f"{run}@5").code == USAGE
    assert cli("import", tmp_path / "in.safetensors", f"{run}@5", "--overwrite").code == OK
    for words in (("--format", "dcp", "--dtype", "bf16"), ("--format", "zip"), ("--format", "dcp", "--overwrite")):
        assert cli("export", run, tmp_path / "x", *words).code == USAGE


MEGA = 1 << 20
CHILD = """
import json, sys
from asyncckpt.cli.app import app

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

if sys.argv[2:]:
    import asyncckpt.integrations.outgoing
for words in json.loads(sys.argv[1]):
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")  # the peak is told from here on
    before = peak()
    try:
        app(words)
    except SystemExit as ended:
        assert ended.code == 0, ended.code
    print("grew", peak() - before)
"""


def growth(*commands, torch=False):
    """By how many bytes the memory of a process grows over each command; torch may be there before."""
    words = json.dumps([[str(word) for word in command] for command in commands])
    child = [sys.executable, "-c", CHILD, words, *(["torch"] if torch else [])]
    done = subprocess.run(child, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("grew")]


def test_conversions_need_memory_for_some_of_it_only(tmp_path):
    big = {f"layer{i}.weight": torch.zeros(8 << 20) for i in range(9)}  # 288 MiB, tensors of 32
    safetensors.torch.save_file(big, tmp_path / "big.safetensors")
    del big
    run, most = tmp_path / "run", 150 * MEGA
    plain = growth(
        ("import", tmp_path / "big.safetensors", run),
        ("export", run, tmp_path / "hub", "--max-shard-size", "100MB"),
    )
    pickled = growth(
        ("export", run, tmp_path / "all.pt", "--format", "torch"),
        ("import", tmp_path / "all.pt", tmp_path / "second", "--allow-pickle"),
        ("export", run, tmp_path / "dcp", "--format", "dcp"),
        ("import", tmp_path / "dcp", tmp_path / "third", "--allow-pickle"),
        torch=True,
    )
    assert len(plain) == 2 and len(pickled) == 4
    assert max(plain) < most and max(pickled) < most, (plain, pickled)
    loaded = asyncckpt.load(tmp_path / "third")["model"]
    assert len(loaded) == 9 and all(t.shape == (8 << 20,) for t in loaded.values())
