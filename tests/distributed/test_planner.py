"""Who stores what, and what rank 0 makes of the offers."""

import pytest

from asyncckpt.distributed.decide import Decider
from asyncckpt.distributed.offers import Item, Loose, Offer
from asyncckpt.distributed.planner import assign
from asyncckpt.errors import RankError
from asyncckpt.write.messages import Fault

ATTEMPT = "0123456789ab"


def item(name, rows, at=0, of=None, lowest=False):
    return Item("model", name, "F32", (of or rows, 4), (at, 0), (rows, 4), lowest)


def offer(items=(), **members):
    return Offer(plan=str(items), items=list(items), parts=["model"], trees={"model": "t"}, **members)


def test_what_all_have_is_stored_once_and_spread_by_bytes():
    alike = [item("a", 100), item("b", 40), item("c", 40), item("d", 20)]
    owned = assign([alike] * 2)
    assert sorted(owned[0] + owned[1]) == [0, 1, 2, 3]
    assert [sum(alike[i].size[0] for i in mine) for mine in owned] == [100, 100]


def test_of_a_buffer_it_is_the_lowest_rank_that_counts():
    owned = assign([[item("w", 9)], [item("buffer", 1, lowest=True), item("w", 9)], [item("buffer", 1, lowest=True)]])
    assert owned[1][:1] == [0] and owned[2] == []


def test_shards_stay_where_they_are_and_copies_of_them_are_stored_once():
    first, second = item("w", 3, 0, 5), item("w", 2, 3, 5)
    owned = assign([[first], [second], [first], [second]])
    assert sorted(map(len, owned)) == [0, 0, 1, 1]
    assert bool(owned[0]) != bool(owned[2]) and bool(owned[1]) != bool(owned[3])


@pytest.mark.parametrize(
    "items",
    [
        [[item("w", 3, 0, 5)], [item("w", 3, 2, 5)]],
        [[item("w", 3, 0, 5)], []],
        [[item("w", 3)], [item("w", 4)]],
    ],
    ids=["overlap", "hole", "two shapes"],
)
def test_shards_that_are_no_tensor_are_refused(items):
    with pytest.raises(RankError):
        assign(items)


def test_what_did_not_change_is_not_told_again():
    decider, items = Decider(), [item("a", 1), item("b", 1)]
    first = decider.decide([offer(items), offer(items)], ATTEMPT)
    assert first.owned is not None and first.attempt == ATTEMPT
    known = Offer(plan=str(items), version=first.version, parts=["model"], trees={"model": "t"})
    second = decider.decide([known, known], ATTEMPT)
    assert second.owned is None and second.version == first.version
    forgetful = Offer(plan=str(items), parts=["model"], trees={"model": "t"})
    assert decider.decide([known, forgetful], ATTEMPT).owned == first.owned


def test_one_rank_without_room_skips_the_save_for_all():
    assert Decider().decide([offer(), offer(room=False)], ATTEMPT).skip


def test_a_failure_or_a_fault_of_one_rank_is_for_all():
    fault = Fault("StorageError", "broken")
    assert Decider().decide([offer(), Offer(fault=fault)], ATTEMPT).faults == {1: fault}
    assert Decider().decide([Offer(failures={"x": fault}), offer()], ATTEMPT).failures == {"x": fault}


def test_tensors_with_the_same_bytes_on_all_ranks_are_stored_once():
    same, other = Loose("d", 8), Loose("e", 8)
    offers = [offer(loose={"model": {"a": same, "b": same}}), offer(loose={"model": {"a": same, "b": other}})]
    assert Decider().decide(offers, ATTEMPT).assigned == {"model": {"a": 0}}


def test_trees_that_are_alike_are_told_so():
    assert Decider().decide([offer(), offer()], ATTEMPT).same == ["model"]
    other = Offer(parts=["model"], trees={"model": "u"}, plan="()", items=[])
    assert Decider().decide([offer(), other], ATTEMPT).same == []


@pytest.mark.parametrize(
    "other",
    [
        Offer(parts=["else"], trees={"else": "t"}, plan="()", items=[]),
        offer(overwrite=True),
        offer(samples={"model": "s"}),
    ],
    ids=["parts", "overwrite", "samples"],
)
def test_ranks_that_want_different_saves_get_an_error(other):
    with pytest.raises(RankError):
        Decider().decide([offer(samples={"model": "r"}), other], ATTEMPT)
