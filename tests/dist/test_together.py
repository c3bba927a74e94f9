"""Several ranks, one checkpoint: what is saved together is restored together."""

import asyncckpt
from support.ranks import RankFailed


def saved(world, step, **options):
    assert world.well("save", step=step, **options) == [None] * len(world.members)
    return world.well("outcome", step=step)


def test_ranks_commit_once_and_each_restores_its_own(tmp_path, nursery):
    with nursery.world(tmp_path / "run", 2) as world:
        world.well("open")
        assert world.well("restore") == [[None, []]] * 2
        for step in (1, 2):
            world.well("train")
            assert saved(world, step) == [["committed", ""]] * 2
        world.well("close")
        before = world.well("content")
    with nursery.world(tmp_path / "run", 2, seed=7) as world:
        world.well("open")
        assert world.well("restore") == [[2, []]] * 2
        after = world.well("content")
        assert after == before
        assert [content[2:] for content in after] == [[0, 2], [1, 2]]
        world.well("train")
        assert saved(world, 3) == [["committed", ""]] * 2
        assert world.well("steps") == [[1, 2, 3]] * 2
        world.well("close")
    run = asyncckpt.open(tmp_path / "run")
    assert run.verify() == 3
    assert not [name for name in (tmp_path / "run").iterdir() if "nonce" in name.name]
