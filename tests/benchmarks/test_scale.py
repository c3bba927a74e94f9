"""The coordinator of many ranks, whose messages and records are made up, commits what can be read."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import scale


def test_it_asks_the_storage_for_each_rank_a_bounded_number_of_times():
    few, many = (scale.measure(world, 200)["commit"] for world in (65, 129))
    more = sum(many["calls"].values()) - sum(few["calls"].values())
    assert 0 < more <= 5 * 64
    assert many["manifest"] > few["manifest"]


def test_what_does_not_change_is_neither_told_nor_decided_again():
    found = scale.decide(scale.World(65, 2000))
    assert found["later"]["received"] < found["first"]["received"] / 3
    assert found["later"]["verdict"] < found["first"]["verdict"] / 3
