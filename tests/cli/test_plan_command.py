"""plan: goodput, interval and limit."""

from __future__ import annotations

import pytest
from support.cli import Command

from asyncckpt.cli import answers


def test_the_plan_prints_goodput_interval_and_limit(cli: Command) -> None:
    text = cli("plan", "--state", "280GB", "--nodes", "2048").out
    assert "1h 48m" in text and "limited by  failures" in text and "assumed: " in text
    data = cli("plan", "--state", "280GB", "--nodes", "2048", "--json").json
    assert data["job"]["mtbf"] == pytest.approx(1.8 * 3600, rel=0.005)
    assert data["limit"] == "failures" and 0.9 < data["estimate"]["goodput"] < 1
    assert data["simulated"]["goodput"] == pytest.approx(data["estimate"]["goodput"], rel=0.05)
    assert data["models"]["ettr"] == pytest.approx(data["estimate"]["goodput"], rel=0.05)
    assert len(data["assumed"]) == 4


@pytest.mark.parametrize(
    ("options", "limit", "interval"),
    [
        (["--mtbf", "1h", "--tax", "2s", "--total-bandwidth", "10GB/s"], "failures", 120.7),
        (["--mtbf", "1h", "--total-bandwidth", "1GB/s"], "bandwidth", 280),
        (["--mtbf", "1h", "--bandwidth", "1GB/s", "--total-bandwidth", "0.5GB/s"], "bandwidth", 560),
        (["--mtbf", "1h", "--nodes", "100", "--latency", "10m"], "queue", 301.4),
        (["--mtbf", "1h", "--nodes", "100", "--latency", "10m", "--max-in-flight", "8"], "failures", 85.3),
        (["--mtbf", "1h", "--nodes", "100", "--max-overhead", "1%"], "overhead", 100),
        (["--mtbf", "1h", "--nodes", "100", "--step-time", "100s"], "step", 100),
    ],
)
def test_the_plan_follows_its_options(cli: Command, options: list[str], limit: str, interval: float) -> None:
    data = cli("plan", "--state", "280GB", *options, "--simulate", "0", "--json").json
    assert (data["limit"], data["interval"]) == (limit, pytest.approx(interval, rel=0.01))
    assert data["simulated"] is None


def test_the_plan_says_what_another_interval_gives(cli: Command) -> None:
    data = cli("plan", "--state", "1GB", "--mtbf", "1h", "--interval", "30m", "--json").json
    assert data["asked"]["interval"] == 1800 and data["asked"]["goodput"] < data["estimate"]["goodput"]


@pytest.mark.parametrize(
    "options",
    [
        ["--state", "0"],
        ["--state", "1GB", "--nodes", "0"],
        ["--state", "1GB", "--mtbf", "0"],
        ["--state", "1GB", "--mtbf", "1h", "--failure-rate", "1e-3"],
        ["--state", "1GB", "--failure-rate", "-1"],
        ["--state", "1GB", "--failure-rate", "nan"],
        ["--state", "1GB", "--bandwidth", "0"],
        ["--state", "1GB", "--tax", "-1s"],
        ["--state", "1GB", "--max-in-flight", "0"],
        ["--state", "1GB", "--max-overhead", "200%"],
        ["--state", "1GB", "--interval", "1ms"],
        ["--state", "1GB", "--simulate", "-1"],
    ],
)
def test_the_plan_refuses_what_makes_no_sense(cli: Command, options: list[str]) -> None:
    found = cli("plan", *options)
    assert found.code == answers.USAGE and found.out == "" and found.err
