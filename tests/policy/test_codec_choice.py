"""`codec="auto"`: compress where a save is committed sooner, and nowhere else."""

import pytest

from asyncckpt.policy.codec import Rates, choose

GB = 1e9


@pytest.mark.parametrize(
    ("sink", "coder", "share", "cores", "expected"),
    [
        (2.5, 0.6, 0.8, 2, "raw"),  # a fast disk: the coder is the slower
        (0.2, 0.6, 0.8, 2, "zstd"),  # a slow disk: fewer bytes
        (0.9, 0.6, 0.66, 1, "raw"),
        (0.9, 0.6, 0.66, 4, "zstd"),
        (0.2, 5.0, 0.99, 8, "raw"),  # nothing to gain
        (0.01, 0.1, 0.5, 1, "zstd"),
    ],
)
def test_the_sooner_committed_is_chosen(sink: float, coder: float, share: float, cores: int, expected: str) -> None:
    rates = Rates(sink * GB, coder * GB, share)
    assert choose("raw", rates, cores) == expected


def test_it_stays_where_the_other_is_not_clearly_better() -> None:
    rates = Rates(1 * GB, 10 * GB, 0.93)
    assert [choose(now, rates, 2) for now in ("raw", "zstd")] == ["raw", "zstd"]


def test_nothing_is_chosen_before_all_is_known() -> None:
    for rates in (Rates(), Rates(sink=GB), Rates(coder=GB, share=0.5), Rates(GB, None, 0.5)):
        assert choose("raw", rates, 4) == "raw" and choose("zstd", rates, 4) == "zstd"


def test_measurements_follow_what_changes_and_keep_what_was_not_measured() -> None:
    rates = Rates(sink=8.0).then(Rates(sink=4.0, coder=2.0, share=0.5))
    assert rates == Rates(6.0, 2.0, 0.5)
    assert rates.then(Rates()) == rates
