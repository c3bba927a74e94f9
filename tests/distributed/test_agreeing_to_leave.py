"""At which call all ranks save for a notice: agreed on by threads, while every rank goes on at its own speed."""

import random
import time
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from threading import Thread

import pytest

from asyncckpt.distributed.group import Group
from asyncckpt.distributed.notices import Notices

MANY = 200_000


def ends(world, seed, gone=()):
    """The call in which each rank was told what to do, and what; ranks `gone` are closed at some call of theirs."""
    coin = random.Random(seed)
    boxes = [SimpleQueue() for _ in range(world)]
    members = [Notices(Group(rank, world, None, ""), 20.0, lambda to, w: boxes[to].put(w)) for rank in range(world)]
    given = {rank: coin.randint(1, 40) for rank in coin.sample(range(world), coin.randint(1, world))}
    closed = set()
    pauses = [coin.random() * 1e-4 for _ in range(world)]

    def deliver(rank):
        while (word := boxes[rank].get()) is not None:
            time.sleep(pauses[-1 - rank] * 10)
            if rank not in closed:
                members[rank].take(word)

    def train(rank):
        for call in range(1, MANY):
            if rank in gone and call == 20:
                members[rank].close()
                closed.add(rank)
                return None
            if given.get(rank) == call:
                members[rank].given("SIGTERM")
            foreseen = members[rank].foresee() if call % 7 == 0 else None
            deed = members[rank].call()
            assert foreseen in (None, deed == "save")
            if deed != "go on":
                return call, deed
            time.sleep(pauses[rank])
        return None

    carriers = [Thread(target=deliver, args=[rank]) for rank in range(world)]
    for carrier in carriers:
        carrier.start()
    try:
        with ThreadPoolExecutor(world) as pool:
            return list(pool.map(train, range(world)))
    finally:
        for box in boxes:
            box.put(None)
        for carrier in carriers:
            carrier.join()


def assert_one_call_for_all():
    for seed in range(25):
        found = ends(2 + seed % 4, seed)
        assert len(set(found)) == 1 and found[0] is not None and found[0][1] == "save", (seed, found)


def test_all_save_at_the_same_call():
    assert_one_call_for_all()


def pass_on(notices):
    return True


def too_early(notices, target, announce=Notices._announce):
    announce(notices, target - 1)


@pytest.mark.parametrize(("where", "bug"), [("_decided", pass_on), ("_announce", too_early)])
def test_planted_bugs_are_seen(monkeypatch, where, bug):
    """A rank that does not wait for the answer; a call that the furthest rank has had already."""
    monkeypatch.setattr(Notices, where, bug)
    with pytest.raises(AssertionError):
        assert_one_call_for_all()


@pytest.mark.parametrize("gone", [0, 2])
def test_where_a_rank_makes_no_more_calls_nobody_waits_for_it(gone, monkeypatch):
    monkeypatch.setattr(f"{__name__}.MANY", 2000)
    begun = time.monotonic()
    for seed in range(5):
        found = ends(3, seed, gone=[gone])
        told = {end[1] for rank, end in enumerate(found) if end is not None and rank != gone}
        assert told <= {"leave"} or ("save" in told and len(set(found)) <= 2), found
    assert time.monotonic() - begun < 15


def test_a_notice_that_rank_0_does_not_hear_holds_nobody_and_is_answered_by_leaving():
    """Rank 0 is dead, or stopped: the rank goes on for as long as it would have waited, and leaves then."""
    alone = Notices(Group(1, 2, None, ""), 0.2, lambda to, word: None)
    assert alone.call() == "go on"
    alone.given("SIGTERM")
    begun, calls = time.monotonic(), 0
    while alone.call() == "go on":
        calls += 1
        assert time.monotonic() - begun < 20
    assert calls > 1 and time.monotonic() - begun > 0.2
    assert alone.call() == "go on", "it is said once"
