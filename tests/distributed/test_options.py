"""What one process can have, several ranks can: clocks, stale parts, exports, codecs. Rank 0 decides for all."""

import shutil

import torch

import asyncckpt
from asyncckpt.catalog.catalog import Catalog
from asyncckpt.format import names
from asyncckpt.read.diff import diff
from asyncckpt.read.export import export
from asyncckpt.read.reader import CheckpointReader
from asyncckpt.storage.local import LocalStorage


def parts_by_step(root):
    return {record.step: "".join(part[:2] for part in record.parts) for record in asyncckpt.open(root).records()}


def test_rank_0_says_which_parts_are_saved_and_which_stale_ones_are_taken(tmp_path, nursery):
    root = tmp_path / "run"
    clocks = {"model": {"steps": 2}, "optimizer": {"steps": 6}}
    with nursery.world(root, 2, "fsdp", parts=clocks) as world:
        world.well("open")
        ends = world.well("loop", steps=10)
        assert ends == [[10, False, [2, 4, 6, 8, 10]]] * 2
        contents = world.well("content")
        world.well("close")
        assert parts_by_step(root) == {2: "moopow", 4: "moow", 6: "moopow", 8: "moow", 10: "moow"}
    everything = {"whim": list(range(11, 40))}
    per_rank = {
        0: {"cadence": {"whim": [12, 15]}, "parts": {"optimizer": {"whim": [12]}}},
        1: {"cadence": {"whim": [12, 13]}, "parts": {"optimizer": everything}},
    }
    with nursery.world(root, 2, "fsdp", seed=1, per_rank=per_rank) as world:
        world.well("open")
        assert all("has the whole state" in str(e) or e[0] == 6 for e in world.all("restore"))
        assert world.well("restore", allow_stale=["optimizer"]) == [[10, []]] * 2
        after = world.well("content")
        assert [c[0] for c in after] == [c[0] for c in contents], "the newest weights"
        assert [c[1] for c in after] != [c[1] for c in contents], "older moments"
        assert world.well("restore", step=6) == [[6, []]] * 2
        assert [c[1] for c in world.well("content")] == [c[1] for c in after], "those of step 6"
        assert all("no step 99" in str(e) or "99" in str(e) for e in world.all("restore", step=99))
        for step in (2, 6):
            shutil.rmtree(root / names.step_name(step))
        answers = world.all("restore", allow_stale=["optimizer"])  # nothing that has it is left: all hear so
        assert all("CheckpointNotFoundError" in str(answer) for answer in answers), answers
        answers = world.all("restore", step=10, allow_stale=["optimizer"])
        assert all("no older checkpoint of its branch has it" in str(answer) for answer in answers), answers
        # each rank would save others, at other steps
        assert [end[2] for end in world.well("loop", start=11, steps=5)] == [[12, 15]] * 2
        world.well("close")
        found = parts_by_step(root)
        assert (found[12], found[15]) == ("moopow", "moow")


def test_exports_and_codecs(tmp_path, nursery):
    root = tmp_path / "run"
    options = {"codec": "delta", "max_chain": 2, "export": {"model": "bf16"}, "keep": {"last": 100}}
    with nursery.world(root, 2, "fsdp", writer="thread", **options) as world:
        world.well("open")
        contents = {}
        for step in (1, 2, 3, 4, 5):
            world.well("train")
            contents[step] = world.well("content")
            world.well("save", step=step)
            assert world.well("outcome", step=step) == [["committed", ""]] * 2
        # a save fails, on rank 0, when the other has written all: the next hangs on what was committed
        world.all("fault", [0], deed="fail", verb="fsync", at=1)
        world.well("train")
        world.well("save", step=6)
        assert [end for end, _ in world.well("outcome", step=6)] == ["failed"] * 2
        world.all("heal", [0])
        contents[7] = world.well("content")
        world.well("save", step=7)
        assert world.well("outcome", step=7) == [["committed", ""]] * 2
        for step in (3, 7, 1):
            assert world.well("restore", step=step) == [[step, []]] * 2
            assert [c[:2] for c in world.well("content")] == [c[:2] for c in contents[step]]
        world.well("close")
    catalog = Catalog(LocalStorage(str(root)))
    attempts = {step: catalog.manifest(step).attempt for step in contents}
    chains = {}
    for step in contents:
        with CheckpointReader(catalog, step) as reader:
            reader.verify()
            assert reader.manifest.exports == ["model-bf16"]
            chains[step] = [max(map(len, share.coded)) for share in reader.shares("model")]
            for part in reader.parts:
                for rank, share in enumerate(reader.shares(part)):
                    assert all(names.coded_of(file.name) == (part, rank) for file in share.files)
                    assert {file.name.split(".")[2] for file in share.files} <= set(attempts.values())
    assert list(chains.values()) == [[1, 1], [2, 2], [3, 3], [1, 1], [2, 2], [3, 3]]
    run = asyncckpt.open(root)
    whole, cast = (run.load(7, parts=[part])[part] for part in ("model", "model-bf16"))
    assert all(torch.equal(cast[name], whole[name].to(torch.bfloat16)) for name in whole)
    with CheckpointReader(catalog, 4) as one, CheckpointReader(catalog, 7) as two:
        found = {part.part: part for part in diff(one, two)}
    assert len(found) == 4 and set(found["model"].changed) == set(whole)
    assert set(found["own"].changed) == {"alike", "values", "values of rank 1"}
    assert [value.path for value in found["own"].values] == ["own['step']", "own['step'] of rank 1"]
    with CheckpointReader(catalog, 7) as reader:
        export(reader, "model-bf16", tmp_path / "model.safetensors")
    for step in (2, 5, 1):
        shutil.rmtree(root / names.step_name(step))
    for step in (3, 4, 7):
        assert run.verify(step) == step
