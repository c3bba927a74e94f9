"""A save reported committed survives a power cut, wherever it falls: real recovery on every disk that may be left."""

import random

import pytest

from asyncckpt.testing import Operation
from crash.rig import FACTOR, Progress, Report, cut_everywhere, cut_recovery, places, record, scaled
from crash.scenarios import SCENARIOS

SAMPLES = 20
RESTARTS = 5 if FACTOR <= 1 else 2


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_every_cut_of_a_life(tmp_path, figure, name, direct):
    scenario = SCENARIOS[name]
    log = record(scenario, tmp_path, direct=direct)
    assert direct == any(entry.verb == "create" and entry.arguments[1] for entry in log if isinstance(entry, Operation))
    report = cut_everywhere(log, tmp_path, places(scenario), samples=scaled(SAMPLES), seed=1)
    figure("model states", report.states)
    report.check()


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", SCENARIOS)
def test_every_cut_of_a_recovery(tmp_path, figure, name):
    """The service is killed, another takes over, clears up and saves; then the power goes."""
    scenario = SCENARIOS[name]
    base = tmp_path / "disk"
    base.mkdir()
    log = record(scenario, base, direct=False)
    points = sorted(random.Random(name).sample(range(len(log) + 1), min(len(log) + 1, scaled(RESTARTS))))
    report, progress = Report(), Progress(f"cuts of recovery, {name}", len(points))
    for at in points:
        report += cut_recovery(log, base, scenario, at=at, samples=min(64, scaled(6)), seed=at)
        progress.step(f"{report.states} states")
    figure("model states", report.states)
    report.check()


def verbs_until(log, verb, count):
    """Where the `count`-th operation of `verb` has just been done."""
    found = [i + 1 for i, entry in enumerate(log) if getattr(entry, "verb", None) == verb]
    return found[count - 1]


@pytest.mark.parametrize(
    ("name", "verb", "count"),
    [("plain", "mkdir", 1), ("plain", "mkdir", 2), ("overwriting", "rename", 1), ("deleting", "unlink", 3)],
    ids=["parent made", "run made", "manifest replaced", "manifest deleted"],
)
def test_a_cut_soon_after_a_takeover_at_a_name_that_is_not_durable(tmp_path, name, verb, count):
    """What the killed one has renamed, made or removed, and not made durable, is not built upon."""
    base = tmp_path / "disk"
    base.mkdir()
    log = record(SCENARIOS[name], base, direct=False)
    cut_recovery(log, base, SCENARIOS[name], at=verbs_until(log, verb, count), samples=80, seed=1).check()
