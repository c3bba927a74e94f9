"""Rounds of several ranks, on threads of this process, over torch's stores."""

import threading
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
import torch.distributed as dist

from asyncckpt.distributed.council import Council, LateRankError
from asyncckpt.distributed.group import Group
from asyncckpt.distributed.mail import Mail, Word
from asyncckpt.errors import CheckpointNotFoundError, RankError

PATIENCE = 20.0


class Said(msgspec.Struct):
    word: str


@pytest.fixture(params=["hash", "file", "tcp"])
def store(request, tmp_path):
    if request.param == "hash":
        return dist.HashStore()
    if request.param == "file":
        return dist.FileStore(str(tmp_path / "store"), 8)
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def councils(store, world, patience=PATIENCE):
    return [Council(Group(rank, world, store, "test"), patience) for rank in range(world)]


def meet(members, what="a round", decide=lambda said: Said("+".join(s.word for s in said))):
    """What each gets of one round, or the error that it raises."""

    def come(council):
        try:
            return council.agree(what, Said(str(council.group.rank)), decide, Said).word
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(members)) as pool:
        return list(pool.map(come, members))


def test_all_get_one_verdict_on_all_offers(store):
    members = councils(store, 4)
    for _ in range(3):
        assert meet(members) == ["0+1+2+3"] * 4


def test_what_rank_0_raises_all_raise(store):
    def refuse(said):
        raise CheckpointNotFoundError("no such step")

    members = councils(store, 3)
    errors = meet(members, decide=refuse)
    assert all(isinstance(e, CheckpointNotFoundError) and "no such step" in str(e) for e in errors)
    assert meet(members) == ["0+1+2"] * 3


@pytest.mark.parametrize("absent", [0, 2])
def test_whoever_does_not_come_is_waited_for_no_longer_than_agreed(store, absent):
    members = councils(store, 3, patience=0.5)
    there = [council for council in members if council.group.rank != absent]
    errors = meet(there)
    assert all(isinstance(e, LateRankError) and e.rank == absent for e in errors)
    assert isinstance(meet([members[absent]])[0], LateRankError)  # it comes later, and hears so at once
    assert meet(members) == ["0+1+2"] * 3


def test_ranks_that_are_at_different_things_are_told(store):
    members = councils(store, 2)
    with ThreadPoolExecutor(2) as pool:
        tasks = [pool.submit(c.agree, f"save of step {c.group.rank}", Said(""), lambda s: s[0], Said) for c in members]
        for task in tasks:
            with pytest.raises(RankError, match="not at the same"):
                task.result(PATIENCE)


def test_nothing_is_left_in_the_store_but_the_last_round():
    store = dist.HashStore()
    members = councils(store, 3)
    for _ in range(20):
        meet(members)
    assert store.num_keys() < 10


def test_a_store_that_is_gone_is_an_error_and_no_hang():
    class Gone:
        def set(self, key, value):
            raise dist.DistNetworkError("connection reset")

        check = set

    council = councils(dist.HashStore(), 2)[1]
    council._store = Gone()
    with pytest.raises(RankError, match="can't be reached"):
        council.agree("a round", Said(""), lambda said: said[0], Said)


def test_words_are_heard_by_those_they_are_for(store):
    heard, changed = [[] for _ in range(3)], threading.Condition()

    def hear(rank, word):
        with changed:
            heard[rank].append((word.sender, word.what))
            changed.notify_all()

    mails = [Mail(Group(r, 3, store, "test"), lambda word, r=r: hear(r, word)) for r in range(3)]
    for mail in mails:
        mail.start()
    for _ in range(5):
        for rank in (1, 2):
            mails[rank].send(0, Word(rank, "ready", "x"))
            mails[0].send(rank, Word(0, "decided", "x"))
    with changed:
        assert changed.wait_for(lambda: list(map(len, heard)) == [10, 5, 5], PATIENCE)
    assert sorted(heard[0]) == [(1, "ready")] * 5 + [(2, "ready")] * 5 and set(heard[1]) == {(0, "decided")}
    for mail in mails:
        mail.close()
