"""A notice to leave: the next `maybe_save` saves at once, a copy under way is committed, a second signal aborts."""

from __future__ import annotations

import logging
import os
import signal
import threading
from errno import ENOSPC

import pytest
import torch
from support.processes import PATIENCE, Hold, until
from support.torch_states import run

import asyncckpt
from asyncckpt import Preemption
from asyncckpt.storage.posix import Posix

USR1 = Preemption(signals=(signal.SIGUSR1,))
RARELY = asyncckpt.Every(steps=10**6)
pytestmark = pytest.mark.usefixtures("signals_are_left_as_they_were")


# What a notice does


def test_without_preempt_no_signal_is_touched(tmp_path):
    before = [signal.getsignal(number) for number in signal.valid_signals()]
    with run(tmp_path / "run", cadence=RARELY) as ckpt:
        assert [signal.getsignal(number) for number in signal.valid_signals()] == before
        assert signal.set_wakeup_fd(-1) == -1
        assert not ckpt.preempted


def test_a_notice_before_the_first_save(tmp_path):
    with run(tmp_path / "run", cadence=RARELY, preempt=USR1) as ckpt:
        assert not ckpt.should_save(7) and ckpt.maybe_save(7, {"x": 7}) is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert ckpt.should_save(8) and ckpt.should_save(8)
        assert not ckpt.preempted, "who looks at it between notice and save must not leave without the save"
        assert ckpt.maybe_save(8, {"x": 8}).result(PATIENCE) == "committed"
        assert ckpt.maybe_save(9, {"x": 9}) is None, "the notice is answered; the cadence decides again"
        assert ckpt.preempted and not ckpt.should_save(10)
    assert ckpt.steps() == [8]


class Sends:
    """Sends the signal while it is being saved."""

    def state_dict(self):
        os.kill(os.getpid(), signal.SIGUSR1)
        return {"x": 1}

    def load_state_dict(self, state):
        pass


def test_a_signal_during_save(tmp_path):
    with run(tmp_path / "run", cadence=asyncckpt.Every(steps=10), preempt=USR1) as ckpt:
        assert ckpt.maybe_save(10, {"x": Sends()}) is not None
        assert not ckpt.preempted, "the notice asks for a save that is begun after it"
        assert ckpt.maybe_save(11, {"x": 11}) is not None
    assert ckpt.steps() == [10, 11]


def test_without_a_cadence_only_a_notice_saves(tmp_path):
    with run(tmp_path / "run", preempt=USR1) as ckpt:
        assert ckpt.maybe_save(1, {"x": 1}) is None and not ckpt.should_save(1)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert ckpt.maybe_save(2, {"x": 2}) is not None
    assert ckpt.steps() == [2]


def test_any_save_begun_after_the_notice_answers_it(tmp_path):
    """Who asks `should_save` and calls `save` leaves the loop like everybody else."""
    with run(tmp_path / "run", preempt=USR1) as ckpt:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert ckpt.should_save(1)
        ckpt.save(1, {"x": 1})
        assert ckpt.preempted and not ckpt.should_save(2)


def test_a_save_that_could_not_be_begun_does_not_answer_a_notice(tmp_path):
    with run(tmp_path / "run", preempt=USR1) as ckpt:
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(asyncckpt.UnsupportedStateError):
            ckpt.maybe_save(1, {"x": object()})
        assert not ckpt.preempted
        assert ckpt.maybe_save(2, {"x": 2}) is not None and ckpt.preempted


def test_the_step_that_is_being_saved_already_is_not_saved_twice(tmp_path):
    with run(tmp_path / "run", preempt=USR1) as ckpt:
        handle = ckpt.save(5, {"x": 5})
        os.kill(os.getpid(), signal.SIGUSR1)
        assert ckpt.maybe_save(5, {"x": 5}) is handle
        assert ckpt.maybe_save(6, {"x": 6}) is None
    assert ckpt.steps() == [5]


@pytest.mark.parametrize("given", [{}, {"when_full": "skip"}])
def test_the_save_upon_a_notice_waits_for_a_place(given, tmp_path, monkeypatch):
    hold = Hold(tmp_path / "hold", "pwrite").install(monkeypatch)
    options = {"cadence": asyncckpt.Every(steps=1), "preempt": USR1, "max_in_flight": 1, "when_full": "skip"}
    with asyncckpt.Checkpointer(tmp_path / "run", **options) as ckpt:
        x = torch.arange(100)
        first = ckpt.maybe_save(1, {"x": x})
        hold.wait_reached()
        assert ckpt.maybe_save(2, {"x": x}).outcome == "skipped"
        os.kill(os.getpid(), signal.SIGUSR1)
        release = threading.Timer(0.2, hold.release)
        release.start()
        assert ckpt.maybe_save(3, {"x": x}, **given).result(PATIENCE) == first.result(PATIENCE) == "committed"
        release.join()
    assert ckpt.steps() == [1, 3]


class Failing(Posix):
    broken = True

    def pwrite(self, fd, data, offset):
        if self.broken:
            raise OSError(ENOSPC, os.strerror(ENOSPC))
        return super().pwrite(fd, data, offset)


def test_an_earlier_failure_does_not_keep_the_last_save_from_being_made(tmp_path, caplog):
    disk = Failing()
    x = {"x": torch.arange(100)}
    ckpt = run(tmp_path / "run", preempt=USR1, _posix=disk)
    failed = ckpt.save(1, x)
    until(failed.done)
    disk.broken = False
    os.kill(os.getpid(), signal.SIGUSR1)
    assert ckpt.maybe_save(2, x).result(PATIENCE) == "committed"
    assert "No space left" in caplog.text
    with pytest.raises(asyncckpt.StorageError, match="No space left"):
        ckpt.close()
    assert ckpt.steps() == [2]


# What the log says


def logged(caplog, text):
    until(lambda: text in caplog.text)


def test_the_log_says_whether_a_save_fits(tmp_path, caplog):
    caplog.set_level(logging.INFO, "asyncckpt")
    state = {"x": torch.arange(100)}
    with run(tmp_path / "unknown", preempt=USR1):
        os.kill(os.getpid(), signal.SIGUSR1)
        logged(caplog, "is not known")
    with run(tmp_path / "fits", preempt=USR1) as ckpt:
        ckpt.save(1, state).result(PATIENCE)
        os.kill(os.getpid(), signal.SIGUSR1)
        logged(caplog, "which fits into the 30 s of grace")
        ckpt.maybe_save(2, state).result(PATIENCE)
        logged(caplog, "within the 30 s of grace")
    with run(tmp_path / "late", preempt=Preemption(signals=(signal.SIGUSR1,), grace=1e-6)) as ckpt:
        ckpt.save(1, state).result(PATIENCE)
        os.kill(os.getpid(), signal.SIGUSR1)
        logged(caplog, "which does NOT fit into the 1e-06 s of grace")
        ckpt.maybe_save(2, state).result(PATIENCE)
        logged(caplog, "1e-06 s of grace are over")


def test_a_save_upon_a_notice_that_fails_is_logged(tmp_path, caplog):
    ckpt = run(tmp_path / "run", preempt=USR1, _posix=Failing())
    os.kill(os.getpid(), signal.SIGUSR1)
    handle = ckpt.maybe_save(2, {"x": torch.arange(100)})
    with pytest.raises(asyncckpt.StorageError):
        handle.result(PATIENCE)
    ckpt.close()
    logged(caplog, "step 2, saved upon the notice, is failed")


# Bad arguments


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"signals": ()}, ValueError),
        ({"signals": ("SIGTERM",)}, TypeError),
        ({"signals": (True,)}, TypeError),
        ({"signals": (signal.SIGKILL,)}, ValueError),
        ({"signals": (signal.SIGSEGV,)}, ValueError),
        ({"signals": (0,)}, ValueError),
        ({"signals": (1000,)}, ValueError),
        ({"grace": 0}, ValueError),
        ({"grace": float("nan")}, ValueError),
        ({"grace": float("inf")}, ValueError),
        ({"grace": "30"}, ValueError),
        ({"poll": 0}, ValueError),
        ({"poll": True}, ValueError),
        ({"probe": 5}, TypeError),
        ({"probe": "ftp://127.0.0.1/x"}, ValueError),
        ({"probe": "http:///x"}, ValueError),
        ({"probe": "http://user:sesame@127.0.0.1/x"}, ValueError),
        ({"headers": {"a": "b"}}, ValueError),
        ({"headers": {"a": "b"}, "probe": "/a/file"}, ValueError),
    ],
)
def test_bad_arguments_are_refused(arguments, error):
    with pytest.raises(error, match=rf"Preemption\({next(iter(arguments))}|Preemption") as caught:
        Preemption(**arguments)
    assert "sesame" not in str(caught.value)


def test_headers_are_kept_out_of_the_repr():
    assert "sesame" not in repr(Preemption(probe="http://127.0.0.1/x", headers={"token": "sesame"}))


def test_signals_off_the_main_thread_are_refused_and_nothing_is_left(tmp_path):
    errors = []

    def make():
        try:
            run(tmp_path / "run", preempt=USR1)
        except ValueError as error:
            errors.append(str(error))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join(PATIENCE)
    assert len(errors) == 1 and "main thread" in errors[0]
    assert not (tmp_path / "run").exists()
    run(tmp_path / "run", preempt=USR1).close()


def test_what_is_no_preemption_is_refused(tmp_path):
    with pytest.raises(TypeError, match="preempt"):
        run(tmp_path / "run", preempt=True)
    assert not (tmp_path / "run").exists()
