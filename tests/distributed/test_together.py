"""Several ranks, one checkpoint: what is saved together is restored together."""

import pytest
from support.ranks import RankFailed

import asyncckpt


def saved(world, step, **options):
    assert world.well("save", step=step, **options) == [None] * len(world.members)
    return world.well("outcome", step=step)


@pytest.mark.parametrize(("layout", "overlap"), [("ddp", False), ("ddp", True), ("fsdp", True)])
def test_ranks_commit_once_and_each_restores_its_own(tmp_path, nursery, layout, overlap):
    with nursery.world(tmp_path / "run", 2, layout, overlap=overlap) as world:
        world.well("open")
        assert world.well("restore") == [[None, []]] * 2
        for step in (1, 2):
            world.well("train")
            assert saved(world, step) == [["committed", ""]] * 2
        world.well("close")
        before = world.well("content")
    with nursery.world(tmp_path / "run", 2, layout, seed=7, overlap=overlap) as world:
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


def test_what_is_changed_after_a_save_is_not_in_it(tmp_path, nursery):
    """The step waits for the copies that go on behind it, on every rank and for every shard."""
    with nursery.world(tmp_path / "run", 2, "fsdp", overlap=True, max_in_flight=4) as world:
        world.well("open")
        contents = {}
        for step in range(1, 5):
            world.well("train")
            contents[step] = world.well("content")[0][:2]
            assert world.well("save", step=step) == [None, None]
        for step in contents:
            assert world.well("outcome", step=step) == [["committed", ""]] * 2
        for step, content in contents.items():
            assert [answer[0] for answer in world.well("restore", step=step)] == [step] * 2
            assert world.well("content")[1][:2] == content


def test_ranks_that_restore_each_for_itself_are_told(tmp_path, nursery):
    with nursery.world(tmp_path / "run", 2, "plain") as world:
        world.well("open")
        saved(world, 1)
        answers = world.all("restore_alone")
        assert all("NotSupportedError" in str(answer) and "Checkpointer" in str(answer) for answer in answers)


def test_what_ranks_can_not_have_is_said(tmp_path, nursery):
    with nursery.world(tmp_path / "run", 2, "plain", when_full="replace") as world:
        answers = world.all("open")
        assert all(isinstance(a, RankFailed) and "NotSupportedError" in str(a) for a in answers)
        assert "'wait' or 'skip'" in str(answers[0])


def test_ranks_that_are_configured_differently_are_told(tmp_path, nursery):
    per_rank = {1: {"preempt": {"grace": 5.0}}}
    with nursery.world(tmp_path / "run", 2, "plain", per_rank=per_rank) as world:
        assert all("preempt= is not given on rank 0, and given on rank 1" in str(a) for a in world.all("open"))


def test_ranks_that_do_not_see_the_same_directory_are_told(tmp_path, nursery):
    with nursery.world(tmp_path / "run", 2, "plain", rank_timeout=5.0) as world:
        world.all("elsewhere", [1], root=str(tmp_path / "other"))
        answers = world.all("open")
        assert all(isinstance(answer, RankFailed) and "RankError" in str(answer) for answer in answers)
        assert "does not find" in str(answers[1])
