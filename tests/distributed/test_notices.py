"""A notice to leave that one rank has got: all save the same step, once, or know in time that they can't."""

import signal
import time

import pytest
from support.ranks import RankGone

import asyncckpt

PREEMPT = {"grace": 20.0}
RARELY = {"steps": 10**6}


def test_one_rank_has_a_notice_and_all_save_the_same_step_once(tmp_path, nursery):
    """The ranks train by collectives, so that one which stood and waited for another's training would hang."""
    root = tmp_path / "run"
    with nursery.world(root, 3, "ddp", cadence=RARELY, preempt=PREEMPT) as world:
        start = 1
        # at one rank; at rank 0; at all, as by torchrun; at all, but not in the same step
        for when in ([None, 20, None], [20, None, None], [20, 20, 20], [21, 23, 22]):
            world.well("open")
            at = [None if step is None else start + step for step in when]
            ends = world.well("loop", start=start, steps=10_000, signal_at=at)
            step = ends[0][0]
            assert ends == [[step, True, [step]]] * 3 and start + 20 <= step <= start + 26, ends
            world.well("close")
            start = step + 1
        assert len(asyncckpt.open(root).steps()) == 4
        # none comes after it: nobody waits for what will not be
        world.well("open")
        assert world.well("loop", start=start, steps=5) == [[start + 4, False, []]] * 3
        world.all("notice", [1])
        begun = time.monotonic()
        world.well("flush")
        world.well("close")
        assert time.monotonic() - begun < 15
        # a rank that has closed its Checkpointer makes no more: the others leave without
        world.well("open")
        assert world.all("close", [2]) == [None]
        world.all("notice", [0])
        assert [end[1:] for end in world.all("loop_alone", [0, 1], start=start)] == [[True, []]] * 2
        world.all("close", [0, 1])
        assert len(asyncckpt.open(root).steps()) == 4
    assert asyncckpt.open(root).verify() == start - 1


def test_a_copy_is_finished_though_a_rank_sits_in_a_c_call_and_one_that_is_stopped_holds_nobody(tmp_path, nursery):
    root = tmp_path / "run"
    with nursery.world(root, 3, "plain", cadence=RARELY, preempt={"grace": 3.0}, overlap=True) as world:
        world.well("open")
        sitting, others = world.members[1], [0, 2]
        sitting.ask("sit", step=1)
        for rank in others:
            world.members[rank].ask("save", step=1)
        assert [world.members[rank].answer() for rank in others] == [None, None]
        sitting.kill(signal.SIGTERM)
        assert world.all("outcome", others, step=1) == [["committed", ""]] * 2
        sitting.kill(signal.SIGTERM)  # again: it ends at once
        with pytest.raises(RankGone):
            sitting.answer()
    with nursery.world(root, 3, "plain", cadence=RARELY, preempt={"grace": 1.0}) as world:
        world.well("open")
        world.members[2].kill(signal.SIGSTOP)
        world.all("notice", [1])
        begun = time.monotonic()
        assert [end[1:] for end in world.all("loop_alone", [0, 1], start=2)] == [[True, []]] * 2
        assert time.monotonic() - begun < 20
    assert asyncckpt.open(root).verify() == 1
