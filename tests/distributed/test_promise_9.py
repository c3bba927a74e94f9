"""No partial checkpoint of several ranks, whatever becomes of any of them; the others hear of it in time."""

import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
from support import processes
from support.ranks import RankFailed, RankGone

import asyncckpt
from asyncckpt.catalog.catalog import Catalog
from asyncckpt.read.reader import CheckpointReader
from asyncckpt.snapshot.rebuild import rebuild_part
from asyncckpt.storage.local import LocalStorage

FACTOR = float(os.environ.get("ASYNCCKPT_TORTURE", "1"))
TRIALS = max(1, round(FACTOR / 10))
TIMEOUT = 2.5
"""Seconds that the ranks wait for each other."""
IN_TIME = 4 * TIMEOUT + 10
"""Within so many, an answer is in time on a busy machine."""
OPTIONS = [{}, {"codec": "delta", "export": {"model": "bf16"}}]
OPERATIONS = 20
"""As many operations on the storage a rank's save has, or more."""


def examined(root):
    """The steps that are committed, each held against itself: all ranks' values are of that step, and whole."""
    catalog = Catalog(LocalStorage(str(root)))
    for step in catalog.committed():
        with CheckpointReader(catalog, step) as reader:
            reader.verify()
            for rank in range(reader.manifest.world):
                own = rebuild_part(CheckpointReader(catalog, step, rank), "own")
                assert (own["rank"], own["step"]) == (rank, step)
                assert own["values"].tolist() == [1000 * rank + step] * 7 and own["alike"].tolist() == [step] * 5
            weights = rebuild_part(reader, "model")
            assert all(set(w.flatten().tolist()) == {step} for w in weights.values()), "a mixture"
    return catalog.committed()


def all_save(world, step, ranks=None):
    world.all("set", ranks, value=step)
    return world.all("save", ranks, step=step)


def outcomes(world, step, ranks):
    """How the save ended on these ranks; it must have, in time."""
    for rank in ranks:
        world.members[rank].ask("outcome", step=step)
    return [world.members[rank].answer(IN_TIME) for rank in ranks]


def trial(root, nursery, size, victim, deed, at, options):
    """Rank `victim` is killed or stopped, or fails, at the `at`-th operation of its writer for its second save."""
    others = [rank for rank in range(size) if rank != victim]
    with nursery.world(root, size, "plain", writer="thread", rank_timeout=TIMEOUT, **options) as world:
        world.well("open")
        assert all_save(world, 1) == [None] * size
        assert [end for end, _ in outcomes(world, 1, range(size))] == ["committed"] * size
        assert world.all("fault", [victim], deed=deed, at=at) == [None]
        begun = time.monotonic()
        for member in world.members:
            member.ask("set", value=2)
            member.ask("save", step=2)
            member.ask("outcome", step=2)
        ends = []
        for rank in others:
            ends.append([world.members[rank].answer(IN_TIME) for _ in range(3)][2][0])
        assert time.monotonic() - begun < IN_TIME
        there = examined(root)
        assert ("committed" in ends) <= (there == [1, 2]), (ends, there)
        if deed == "kill":
            return
        world.members[victim].kill(signal.SIGCONT)
        drained(world.members[victim], 3)
        assert all_save(world, 3) == [None] * size
        assert [end for end, _ in outcomes(world, 3, range(size))] == ["committed"] * size
        assert set(examined(root)) >= {1, 3}


def drained(member, answers):
    for _ in range(answers):
        try:
            member.answer(IN_TIME)
        except RankFailed:
            pass


DEEDS = [
    (size, victim, deed)
    for size in (2, 3, 4)
    for victim in (0, 1)
    for deed in ("kill", "stop", "fail")
    if FACTOR > 1 or size == 2
]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("size", "victim", "deed"), DEEDS)
def test_a_rank_that_is_lost_at_any_operation(tmp_path, nursery, size, victim, deed):
    coin = random.Random(f"{size} {victim} {deed}")
    for number in range(TRIALS):
        root = tmp_path / str(number)
        trial(root, nursery, size, victim, deed, coin.randint(1, OPERATIONS), coin.choice(OPTIONS))


def test_what_all_have_staged_commits_though_every_trainer_is_killed(tmp_path, nursery):
    with nursery.world(tmp_path / "run", 3, "plain") as world:
        world.well("open")
        world.well("set", value=1)
        world.well("save", step=1)
        assert world.well("staged", step=1) == [True] * 3
        for member in world.members:
            os.killpg(member.pid, signal.SIGKILL)
        for member in world.members:
            with pytest.raises(RankGone):
                member.answer()
    with asyncckpt.Checkpointer(tmp_path / "run", lock_timeout=60) as ckpt:  # waits for the writer that is left
        assert ckpt.steps() == [1]
    assert examined(tmp_path / "run") == [1]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_writer_that_is_killed_fails_the_save_for_all_at_once_and_the_next_one_works(tmp_path, nursery, victim):
    killed = str(Path(processes.__file__).with_name("killed_writer.py"))
    per_rank = {victim: {"command": [sys.executable, "-P", killed, "fsync", "2"]}}
    with nursery.world(tmp_path / "run", 2, "plain", per_rank=per_rank, rank_timeout=60.0) as world:
        world.well("open")
        begun = time.monotonic()
        all_save(world, 1)
        ends = outcomes(world, 1, [0, 1])
        assert [end for end, _ in ends] == ["failed", "failed"]
        assert "rank" in ends[1 - victim][1]
        assert time.monotonic() - begun < 30, "they waited for the deadline"
        assert examined(tmp_path / "run") == []


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_does_not_come_to_a_save_holds_nobody_for_ever(tmp_path, nursery, victim):
    with nursery.world(tmp_path / "run", 2, "plain", rank_timeout=TIMEOUT) as world:
        world.well("open")
        world.members[victim].kill(signal.SIGSTOP)
        other = 1 - victim
        assert all_save(world, 1, [other]) == [None]
        end, why = outcomes(world, 1, [other])[0]
        assert end == "failed" and f"rank {victim} did not" in why
        world.members[victim].kill(signal.SIGCONT)
        assert all_save(world, 1, [victim]) == [None]  # it finds that it was not waited for
        assert outcomes(world, 1, [victim])[0][0] == "failed"
        assert all_save(world, 2) == [None, None]
        assert [end for end, _ in outcomes(world, 2, [0, 1])] == ["committed"] * 2
        assert examined(tmp_path / "run") == [2]


def test_a_failed_save_is_raised_on_every_rank_at_the_same_step(tmp_path, nursery):
    fault = {"deed": "fail", "verb": "pwrite", "at": 1, "error": 28}
    per_rank = {1: {"fault": fault}}
    with nursery.world(tmp_path / "run", 3, "plain", per_rank=per_rank, writer="thread", on_error="raise") as world:
        world.well("open")
        assert all_save(world, 1) == [None] * 3
        assert world.all("ended", [1], step=1) == [True]  # the others may not know it yet
        answers = all_save(world, 2)
        assert all(isinstance(answer, RankFailed) for answer in answers), answers
        assert any("No space left" in str(answer) for answer in answers), answers  # or: its files were gone by then
        assert all_save(world, 3) == [None] * 3
        assert [end for end, _ in outcomes(world, 3, range(3))] == ["committed"] * 3
        assert examined(tmp_path / "run") == [3]


def is_stopped(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_a_full_queue_is_one_decision(tmp_path, nursery):
    """One rank's storage hangs; with "skip" the next saves are skipped by all, and the ones after that are taken."""
    fault = {"deed": "stop", "verb": "fsync", "at": 1}
    per_rank = {1: {"fault": fault}}
    with nursery.world(
        tmp_path / "run", 2, "plain", per_rank=per_rank, writer="thread", when_full="skip", max_in_flight=1
    ) as world:
        world.well("open")
        for member in world.members:
            member.ask("save", step=1)
            member.ask("save", step=2)
        assert world.members[0].answer() is None
        processes.until(lambda: is_stopped(world.members[1].pid))
        world.members[1].kill(signal.SIGCONT)
        assert [member.answer() for member in world.members[1:]] == [None]
        assert [member.answer() for member in world.members] == [None, None]
        ends = [[end for end, _ in outcomes(world, step, [0, 1])] for step in (1, 2)]
        assert ends[0] == ["committed"] * 2 and len(set(ends[1])) == 1


@pytest.mark.parametrize("victims", [[0], [1, 2]])
def test_what_all_have_staged_commits_for_the_others_when_some_trainers_are_killed(tmp_path, nursery, victims):
    others = [rank for rank in range(3) if rank not in victims]
    with nursery.world(tmp_path / "run", 3, "plain", rank_timeout=30.0) as world:
        world.well("open")
        world.well("set", value=1)
        world.well("save", step=1)
        assert world.well("staged", step=1) == [True] * 3
        for rank in victims:
            world.members[rank].kill()
        assert outcomes(world, 1, others) == [["committed", ""]] * len(others)
        assert examined(tmp_path / "run") == [1]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_writer_that_is_stopped_fails_the_save_for_all_in_time_and_the_next_one_works(tmp_path, nursery, victim):
    with nursery.world(tmp_path / "run", 2, "plain", rank_timeout=TIMEOUT) as world:
        world.well("open")
        writer = world.well("writer")[victim]
        os.kill(writer, signal.SIGSTOP)
        try:
            for member in world.members:
                member.ask("set", value=1)
                member.ask("save", step=1)
            other = world.members[1 - victim]
            begun = time.monotonic()
            assert [other.answer(IN_TIME) for _ in range(2)] == [None, None]
            other.ask("outcome", step=1)
            assert other.answer(IN_TIME)[0] == "failed"
            assert time.monotonic() - begun < IN_TIME
        finally:
            os.kill(writer, signal.SIGCONT)
        drained(world.members[victim], 2)
        assert outcomes(world, 1, [victim])[0][0] == "failed"
        assert all_save(world, 2) == [None, None]
        assert [end for end, _ in outcomes(world, 2, [0, 1])] == ["committed"] * 2
        assert examined(tmp_path / "run") == [2]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_without_memory_fails_the_save_for_all_at_once(tmp_path, nursery, victim):
    """It fails right after all have agreed, when the others may not even have begun."""
    per_rank = {victim: {"memory_limit": 1000}}
    with nursery.world(tmp_path / "run", 3, "plain", per_rank=per_rank, rank_timeout=120.0) as world:
        world.well("open")
        begun = time.monotonic()
        for step in (1, 2):
            answers = all_save(world, step)
            assert isinstance(answers[victim], RankFailed) and "memory_limit" in str(answers[victim])
            others = [rank for rank in range(3) if rank != victim]
            assert [end for end, _ in outcomes(world, step, others)] == ["failed"] * 2
        assert time.monotonic() - begun < 60, "they waited for the deadline"
        assert examined(tmp_path / "run") == []
