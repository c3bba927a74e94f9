import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncckpt.cli import units


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (units.size, "280GB", 280e9),
        (units.size, "280 gb", 280e9),
        (units.size, "2GiB", 2 * 2**30),
        (units.size, "2Gi", 2 * 2**30),
        (units.size, "1.5e9", 1.5e9),
        (units.size, "17", 17),
        (units.size, "17B", 17),
        (units.size, "2GB/s", 2e9),
        (units.size, "3.5TiB", 3.5 * 2**40),
        (units.seconds, "90", 90),
        (units.seconds, "250ms", 0.25),
        (units.seconds, "5m", 300),
        (units.seconds, "5min", 300),
        (units.seconds, "1h30m", 5400),
        (units.seconds, "1h 30m", 5400),
        (units.seconds, "7d", 604800),
        (units.seconds, "1.8h", 6480),
        (units.seconds, "0", 0),
        (units.share, "1%", 0.01),
        (units.share, "0.01", 0.01),
    ],
)
def test_what_people_write_is_understood(parse: Callable[[str], float], text: str, value: float) -> None:
    assert parse(text) == pytest.approx(value)


@pytest.mark.parametrize(
    "text", ["", " ", "GB", "-1", "1x", "1..2", "nan", "inf", "1e999", "1h30", "1 2", "five", "1\n2"]
)
@pytest.mark.parametrize("parse", [units.size, units.seconds, units.share])
def test_what_makes_no_sense_is_refused(parse: Callable[[str], float], text: str) -> None:
    if parse is units.share and text == "-1":
        return  # the planner refuses it
    with pytest.raises(ValueError, match="give"):
        parse(text)


@given(st.floats(1, 1e18))
def test_a_size_reads_back_as_it_is_shown(count: float) -> None:
    assert units.size(units.show_size(count)) == pytest.approx(count, rel=0.006, abs=0.6)


@given(st.floats(1e-3, 1e7))
def test_a_time_reads_back_as_it_is_shown(value: float) -> None:
    shown = units.show_seconds(value)
    assert units.seconds(shown) == pytest.approx(value, rel=0.02)
    assert math.isfinite(units.seconds(shown))
