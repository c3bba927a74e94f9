"""torch.distributed.checkpoint on the drop-ins, over real ranks: any layout, any world size, one commit or none."""

import errno

import pytest
import torch
from support.ranks import RankFailed, RankGone

import asyncckpt


def dcp(world, deed, ranks=None, **options):
    return world.all("dcp", ranks, deed=deed, **options)


def trained(world):
    world.well("train")
    return [content[:2] for content in world.well("content")]


CHAIN = [("fsdp", 2), ("plain", 1), ("2d", 4), ("hybrid", 2)]


def test_a_state_goes_from_one_layout_to_the_next(tmp_path, nursery):
    root = str(tmp_path / "run")
    known = None
    for i, (layout, size) in enumerate(CHAIN):
        with nursery.world(tmp_path, size, layout, seed=i) as world:
            if known is not None:
                assert dcp(world, "load", root=root) == [known] * size
            known = trained(world)[0]
            assert dcp(world, "save", root=root, asynchronous="thread" if i % 2 else "") == [""] * size
    run = asyncckpt.open(root)
    assert run.steps() == [1, 2, 3, 4]
    for step in run.steps():
        run.verify(step)
    loaded = run.load()
    assert loaded["progress"] == {"step": 7, "words": ("a", b"b", None)}
    assert [w.double().flatten().tolist() for w in loaded["model"].values()] == known[0]


def test_a_process_of_each_rank_saves_and_tells_its_errors(tmp_path, nursery):
    root = str(tmp_path / "run")
    with nursery.world(tmp_path, 2, "fsdp") as world:
        known = trained(world)
        assert dcp(world, "save", root=root, step=4, asynchronous="process") == ["", ""]
        answers = dcp(world, "save", root=root, step=4, asynchronous="process")
        assert all("rank 0: CheckpointExistsError" in answer for answer in answers), answers
        world.well("train")
        assert dcp(world, "load", root=root) == known
    assert asyncckpt.open(root).verify() == 4


def test_what_a_checkpointer_of_several_ranks_has_saved_is_read(tmp_path, nursery):
    root = str(tmp_path / "run")
    with nursery.world(tmp_path / "run", 2, "fsdp") as world:
        world.well("open")
        world.well("train")
        world.well("save", step=3)
        world.well("outcome", step=3)
        weights = world.well("content")[0][0]
        world.well("close")
    with nursery.world(tmp_path, 1, "plain", seed=1) as world:
        assert dcp(world, "load_model", root=root) == [weights]


def test_if_one_rank_fails_nothing_is_committed_and_the_next_save_works(tmp_path, nursery):
    root = str(tmp_path / "run")
    with nursery.world(tmp_path, 2, "fsdp") as world:
        world.well("train")
        for rank, verb in ((1, "fsync"), (0, "pwrite"), (0, "link")):
            world.all("fault", [rank], deed="fail", verb=verb, at=1, error=errno.ENOSPC)
            answers = dcp(world, "save", root=root)
            assert all(f"rank {rank}: StorageError" in answer for answer in answers), answers
            assert asyncckpt.open(root).steps() == []
            world.all("fault", [rank], deed="fail", verb="stat", at=10**9)
        answers = dcp(world, "refuse", root=root, on=1)
        assert all("rank 1: UnsupportedStateError: values['of_1']" in answer for answer in answers), answers
        assert asyncckpt.open(root).steps() == []
        assert dcp(world, "save", root=root) == ["", ""]
        answers = dcp(world, "save", root=root, step=1)
        assert all("rank 0: CheckpointExistsError" in answer for answer in answers)
        assert dcp(world, "save", root=root, step=1, overwrite=True) == ["", ""]
    assert asyncckpt.open(root).steps() == [1]
    assert asyncckpt.open(root).verify() == 1
    folders = [path for path in (tmp_path / "run" / "step-00000001").iterdir() if path.is_dir()]
    assert len(folders) == 1  # what failed, and what was replaced, is gone


@pytest.mark.parametrize(("rank", "at"), [(1, 3), (0, 6)])
def test_a_rank_killed_in_a_save_leaves_the_last_checkpoint_the_newest(tmp_path, nursery, rank, at):
    root = str(tmp_path / "run")
    with nursery.world(tmp_path, 2, "fsdp") as world:
        known = trained(world)
        assert dcp(world, "save", root=root) == ["", ""]
        world.well("train")
        world.all("fault", [rank], deed="kill", at=at)
        answers = dcp(world, "save", root=root)
        assert isinstance(answers[rank], RankGone)
        assert isinstance(answers[1 - rank], RankFailed) or answers[1 - rank]
    with nursery.world(tmp_path, 1, "plain") as world:
        assert dcp(world, "load", root=root) == known[:1]
        assert dcp(world, "save", root=root) == [""]
    assert asyncckpt.open(root).steps() == [1, 2]


def test_damage_is_found_before_a_byte_of_it_is_used(tmp_path, nursery):
    root = str(tmp_path / "run")
    with nursery.world(tmp_path, 2, "fsdp") as world:
        world.well("train")
        assert dcp(world, "save", root=root) == ["", ""]
        file = asyncckpt.open(root).path(1) / "model.rank-00001.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        before = trained(world)
        answers = dcp(world, "load", root=root)
        assert all("CorruptCheckpointError" in answer for answer in answers), answers
        assert [content[:2] for content in world.well("content")] == before
    assert torch.is_tensor(next(iter(asyncckpt.load(root, parts=["optimizer"])["optimizer"]["state"].values()))["step"])
