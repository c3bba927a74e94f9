"""When `maybe_save` saves: what the cadence says, asked without consequences, and never what `save` is held to."""

from __future__ import annotations

import time

import pytest
from support.models import train_step, training
from support.processes import PATIENCE
from support.torch_states import run

import asyncckpt


class Squares:
    """A cadence of the user's own."""

    def __init__(self):
        self.moments = []

    def due(self, moment):
        self.moments.append(moment)
        return int(moment.step**0.5) ** 2 == moment.step


def test_a_cadence_of_the_users_own_is_obeyed(tmp_path):
    with run(tmp_path / "run", cadence=Squares()) as ckpt:
        saved = [step for step in range(1, 20) if ckpt.maybe_save(step, {"x": step})]
        ckpt.wait_until_flushed(PATIENCE)
        assert saved == ckpt.steps() == [1, 4, 9, 16]


def test_asking_changes_nothing_and_tells_what_maybe_save_would_do(tmp_path):
    with run(tmp_path / "run", cadence=asyncckpt.Every(steps=3)) as ckpt:
        for step in range(1, 10):
            answers = {ckpt.should_save(step) for _ in range(5)}
            assert answers == {ckpt.maybe_save(step, {"x": step}) is not None}
        ckpt.wait_until_flushed(PATIENCE)
        assert ckpt.steps() == [3, 6, 9]


def test_the_time_since_the_last_save_counts_from_any_save(tmp_path):
    cadence = Squares()
    with run(tmp_path / "run", cadence=cadence) as ckpt:
        asked = time.monotonic()
        while time.monotonic() < asked + 0.05:
            pass
        ckpt.should_save(2)
        assert cadence.moments[-1].since_save > 0.04
        saved = time.monotonic()
        ckpt.save(2, {"x": 2})
        ckpt.should_save(3)
        assert 0 <= cadence.moments[-1].since_save <= time.monotonic() - saved


def test_save_is_not_held_to_the_cadence(tmp_path):
    with run(tmp_path / "run", cadence=asyncckpt.Every(steps=1000)) as ckpt:
        assert ckpt.save(7, {"x": 7}).result(PATIENCE) == "committed"


@pytest.mark.parametrize("cadence", [100, "100", asyncckpt.Every, object()])
def test_what_is_no_cadence_is_refused(cadence, tmp_path):
    with pytest.raises(TypeError, match="due"):
        run(tmp_path / "run", cadence=cadence)
    assert not (tmp_path / "run").exists()


def test_without_a_cadence_asking_is_an_error(tmp_path):
    with run(tmp_path / "run") as ckpt, pytest.raises(ValueError, match="cadence"):
        ckpt.should_save(1)


def test_auto_measures_a_real_training_and_says_what_it_chose(tmp_path):
    state = training()
    handles = []
    with run(tmp_path / "run", cadence=asyncckpt.Auto(max_overhead=0.2), keep=asyncckpt.Keep(last=1)) as ckpt:
        assert ckpt.stats().interval is None
        deadline = time.monotonic() + PATIENCE
        step = 0
        while len(handles) < 12 and time.monotonic() < deadline:
            step += 1
            train_step(state)
            handle = ckpt.maybe_save(step, state)
            if handle is not None:
                assert all(earlier.done() for earlier in handles)
                handles.append(handle)
        stats = ckpt.stats()
    assert len(handles) == 12
    assert stats.step_seconds > 0 and stats.save_tax > 0
    assert stats.interval.seconds >= stats.save_tax / 0.2 * 0.9
    assert stats.interval.limit in ("overhead", "drain", "step") and stats.interval.why


def test_auto_needs_nobody_but_the_optimizer_to_tell_it_of_steps(tmp_path):
    """`should_save` and `save` instead of `maybe_save`."""
    state = training()
    with run(tmp_path / "run", cadence=asyncckpt.Auto(max_overhead=0.2), keep=asyncckpt.Keep(last=1)) as ckpt:
        deadline = time.monotonic() + PATIENCE
        step = 0
        while ckpt.stats().committed < 4 and time.monotonic() < deadline:
            step += 1
            train_step(state)
            if ckpt.should_save(step):
                ckpt.save(step, state)
        assert ckpt.stats().committed == 4
        assert ckpt.stats().interval is not None
