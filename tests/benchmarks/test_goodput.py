"""The goodput benchmark: real lives that are really killed, and what is concluded of them."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from asyncckpt.policy.plan import plan
from benchmarks import goodput, supervisor
from benchmarks.child import ChildError, Record

QUICK = supervisor.Setting(mtbf=2.0, kills=2, sequence=16)


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    """One short round of asyncckpt with Auto."""
    folder = tmp_path_factory.mktemp("goodput")
    with supervisor.nursery(120.0) as child:
        return {
            name: supervisor.play(child, QUICK, name, every, folder / name.replace(" ", "-"), 0)
            for name, every in {"asyncckpt, Auto": 0}.items()
        }


def test_lives_are_killed_at_the_same_instants_and_go_on_from_what_is_whole(rounds: dict[str, Record]) -> None:
    """`play` itself refuses a life that goes on from less than what had been reported whole."""
    for played in rounds.values():
        lives = played["lives"]
        assert len(lives) == QUICK.kills
        assert 0 <= played["useful"] <= sum(life["steps"] for life in lives)
        assert played["useful"] >= lives[-1]["newest"]
        assert lives[0]["start"] == 0
    walls = [played["wall"] for played in rounds.values()]
    assert min(walls) >= sum(supervisor.gaps(QUICK, 0))


def test_a_life_that_goes_on_from_too_little_is_told() -> None:
    lives = [{"start": 0, "newest": 7}, {"start": 7, "newest": 7}]
    supervisor.check_nothing_was_lost("x", lives, 7)
    supervisor.check_nothing_was_lost("x", [{"start": 0, "newest": 7}, {"start": None, "newest": 7}], 9)
    with pytest.raises(ChildError, match="resumed at 6, where 7"):
        supervisor.check_nothing_was_lost("x", lives, 6)


def _pilot(peer: str, tax: float) -> Record:
    """Steps of 0.1 s; saves are whole after 0.2 s."""
    told: list[Record] = []
    for number, saving in enumerate([False, True, True, False] * 2):
        told += [{"what": "called", "step": number, "at": 10.0}, {"what": "saved", "step": number, "at": 10.2}]
        seconds = 40 * 0.1 + 4 * tax * saving
        told.append({"what": "window", "saving": saving, "steps": 40, "saves": 4 * saving, "seconds": seconds})
    return {"kind": "pilot", "peer": peer, "told": told, "restarts": [0.5, 0.6, 0.4]}


def test_costs_are_what_the_pilot_shows() -> None:
    assert asdict(goodput.costs_of(_pilot("x", 0.05))) == {
        "step": pytest.approx(0.1),
        "tax": pytest.approx(0.05),
        "commit": pytest.approx(0.2),
        "restart": 0.5,
    }


def test_useful_steps_are_held_against_all_and_against_the_plan() -> None:
    life = {"seconds": 5.0, "start": 0, "steps": 60, "saves": 3, "newest": 50, "intervals": [9.0, 1.0]}
    name = "asyncckpt, Auto"
    play = {"kind": "round", "arm": name, "seed": 0, "every": 0, "wall": 10.0, "useful": 90, "lives": [life, life]}
    setting = supervisor.Setting(mtbf=5.0)
    records = [{"kind": "setting", "setting": asdict(setting)}, _pilot("asyncckpt", 0.05), play, {**play, "useful": 60}]
    (found,) = goodput.outcomes(records)
    assert (found.useful, found.steps, found.kills, found.kept) == (150, 240, 4, pytest.approx(150 / 240))
    assert found.goodput == pytest.approx(150 * 0.1 / 20.0)
    assert found.rounds == [pytest.approx(0.75), pytest.approx(0.5)]
    assert found.chosen is not None and found.chosen.median == 1.0
    best = plan(goodput.costs_of(_pilot("asyncckpt", 0.05)).job(5.0))
    assert found.predicted.kept == pytest.approx(best.estimate.kept, abs=0.02)


def test_a_fixed_interval_is_the_planners_best_in_whole_steps() -> None:
    job = goodput.costs_of(_pilot("x", 0.05)).job(5.0)
    every, seconds = goodput.interval_of(job, fixed=True)
    assert every == round((plan(job).interval - job.tax) / job.step) or abs(seconds - plan(job).interval) <= job.step
    assert seconds == pytest.approx(every * job.step + job.tax)
