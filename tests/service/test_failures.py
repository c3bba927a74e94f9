"""Nothing fails in silence: a background error is told once, at the latest by flush and close."""

import errno
import os

import pytest
from support.models import training
from support.processes import PATIENCE

import asyncckpt
from asyncckpt.storage.posix import Posix


class Failing(Posix):
    """The disk is bad while `broken` is set."""

    broken = False

    def pwrite(self, fd, data, offset):
        if self.broken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().pwrite(fd, data, offset)


@pytest.fixture
def disk():
    return Failing()


@pytest.fixture
def make(tmp_path, disk):
    def make(**options):
        return asyncckpt.Checkpointer(tmp_path / "run", writer="thread", _posix=disk, **options)

    return make


def fail(ckpt, disk, step, state):
    """A save of `step` that has failed; nobody was told."""
    disk.broken = True
    handle = ckpt.save(step, state)
    ckpt._session.drain(PATIENCE)
    disk.broken = False
    assert handle.outcome == "failed"
    return handle


def test_the_next_save_raises_once_and_the_one_after_works(make, disk):
    state = training()
    with make() as ckpt:
        ckpt.save(1, state).result(PATIENCE)
        fail(ckpt, disk, 2, state)
        with pytest.raises(asyncckpt.StorageError, match="No space left") as caught:
            ckpt.save(3, state)
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.retryable
        assert ckpt.steps() == [1]
        assert ckpt.save(3, state).result(PATIENCE) == "committed"


def test_with_warn_the_next_save_warns_once_and_flush_raises_all(make, disk):
    state = training()
    with make(on_error="warn") as ckpt:
        fail(ckpt, disk, 1, state)
        with pytest.warns(RuntimeWarning, match="No space left"):
            fail(ckpt, disk, 2, state)
        with pytest.warns(RuntimeWarning, match="No space left"):
            ckpt.save(3, state).result(PATIENCE)
        ckpt.save(4, state).result(PATIENCE)  # warned of each already: warnings are errors in these tests
        with pytest.raises(asyncckpt.StorageError) as caught:
            ckpt.wait_until_flushed(PATIENCE)
        assert len(caught.value.__notes__) == 1
        ckpt.wait_until_flushed(PATIENCE)
        assert ckpt.steps() == [3, 4]


def test_what_result_has_raised_is_not_raised_again(make, disk):
    state = training()
    with make() as ckpt:
        handle = fail(ckpt, disk, 1, state)
        with pytest.raises(asyncckpt.StorageError):
            handle.result()
        assert ckpt.save(2, state).result(PATIENCE) == "committed"


def test_close_raises_and_still_gives_the_run_up(make, disk):
    state = training()
    ckpt = make()
    fail(ckpt, disk, 1, state)
    with pytest.raises(asyncckpt.StorageError):
        ckpt.close()
    ckpt.close()
    with pytest.raises(asyncckpt.CheckpointError, match="closed"):
        ckpt.save(2, state)
    with make(lock_timeout=0) as second:
        assert second.save(2, state).result(PATIENCE) == "committed"


def test_the_error_of_the_body_is_the_one_that_leaves_a_with_block(make, disk, caplog):
    state = training()
    with pytest.raises(ZeroDivisionError), make() as ckpt:
        fail(ckpt, disk, 1, state)
        raise ZeroDivisionError
    assert "No space left" in caplog.text


def test_a_save_that_is_refused_leaves_the_queue_as_it_was(make):
    state = training()
    with make(max_in_flight=1) as ckpt:
        for _ in range(3):
            with pytest.raises(asyncckpt.UnsupportedStateError):
                ckpt.save(1, {**state, "odd": object()})
        ckpt.save(1, state).result(PATIENCE)
        for _ in range(3):
            with pytest.raises(asyncckpt.CheckpointExistsError, match="overwrite"):
                ckpt.save(1, state)
        assert ckpt.save(2, state).result(PATIENCE) == "committed"
        assert ckpt.stats().failed == 0


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_in_flight": 0}, ValueError),
        ({"max_in_flight": True}, ValueError),
        ({"memory_limit": -1}, ValueError),
        ({"when_full": "later"}, ValueError),
        ({"writer": "fork"}, ValueError),
        ({"overlap": "never"}, ValueError),
        ({"overlap": 1}, ValueError),
        ({"on_error": "ignore"}, ValueError),
        ({"lock_timeout": float("nan")}, ValueError),
    ],
)
def test_bad_options_are_refused_at_construction(tmp_path, options, error):
    (name,) = options
    with pytest.raises(error, match=name):
        asyncckpt.Checkpointer(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("url", ["ftp://bucket/run", "", b"run"])
def test_what_names_no_run_is_refused(url):
    with pytest.raises(ValueError):
        asyncckpt.Checkpointer(url)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"step": -1}, ValueError),
        ({"step": 1 << 63}, ValueError),
        ({"step": 1.0}, TypeError),
        ({"step": True}, TypeError),
        ({"step": "7"}, TypeError),
        ({"metrics": {"loss": "low"}}, TypeError),
        ({"metrics": {1: 2.0}}, TypeError),
        ({"when_full": "later"}, ValueError),
        ({"parts": ["nothing"]}, ValueError),
        ({"state": {}}, asyncckpt.UnsupportedStateError),
        ({"state": {"a/b": 1}}, asyncckpt.UnsupportedStateError),
        ({"state": {"..": 1}}, asyncckpt.UnsupportedStateError),
        ({"state": {"A": 1, "a": 2}}, asyncckpt.UnsupportedStateError),
        ({"state": [1, 2]}, asyncckpt.UnsupportedStateError),
    ],
)
def test_bad_arguments_of_save_are_refused_and_nothing_is_written(make, arguments, error):
    with make() as ckpt:
        with pytest.raises(error):
            ckpt.save(**{"step": 1, "state": {"x": 1}, **arguments})
        assert ckpt.steps() == []
        assert ckpt.save(1, {"x": 1}).result(PATIENCE) == "committed"


def test_maybe_save_needs_a_cadence_and_obeys_it(make):
    with make() as ckpt, pytest.raises(ValueError, match="cadence"):
        ckpt.maybe_save(1, {"x": 1})
    with make(cadence=asyncckpt.Every(steps=3)) as ckpt:
        handles = [ckpt.maybe_save(step, {"x": step}) for step in range(1, 8)]
        ckpt.wait_until_flushed(PATIENCE)
        assert [h is not None for h in handles] == [False, False, True, False, False, True, False]
        assert ckpt.steps() == [3, 6]
