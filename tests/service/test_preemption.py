"""A notice to leave: the next `maybe_save` saves at once, a copy under way is committed, a second signal aborts."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
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


# In a real training process

TRAINER = """
import ctypes, os, signal, sys, threading, time
import torch, asyncckpt
from asyncckpt import signals
from asyncckpt.write import client

folder, echo, *command = sys.argv[1:]
client.COMMAND = command or client.COMMAND
torch.manual_seed(0)
model = torch.nn.Linear(256, 256)
optimizer = torch.optim.AdamW(model.parameters())
state = {"model": model, "optimizer": optimizer}

def train_step():
    model(torch.randn(4, 256)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()

def say(*words):
    os.write(1, (" ".join(map(str, words)) + os.linesep).encode())  # one write: a child says things, too

libc = ctypes.CDLL(None)
locked = ctypes.create_string_buffer(64)
libc.pthread_mutex_lock(locked)

ckpt = asyncckpt.Checkpointer(
    folder, cadence=asyncckpt.Every(steps=10**6), preempt=asyncckpt.Preemption(grace=25.0), overlap=True
)
"""

LOOP = """
signals._ECHO = float(echo)
with ckpt:
    for step in range(1, 10**9):
        train_step()
        ckpt.maybe_save(step, state)
        if step == 20:
            say("training")
        if ckpt.preempted:
            break
    say("left", step)
    sys.stdin.readline()
"""


def test_the_loop_saves_and_leaves(tmp_path, start):
    """The same signal soon again is an echo: a scheduler and a launcher both pass it on. Another signal is no second
    one: Slurm sends SIGUSR1, and SIGTERM a minute later.
    """
    trainer = start(TRAINER + LOOP, tmp_path / "run", 60)
    assert trainer.read_line() == "training"
    trainer.kill(signal.SIGTERM)
    word, step = trainer.read_line().split()
    assert word == "left"
    trainer.kill(signal.SIGTERM)
    trainer.kill(signal.SIGUSR1)
    trainer.process.stdin.write(b"\n")
    trainer.process.stdin.flush()
    code, errors = trainer.end()
    assert code == 0, errors
    assert asyncckpt.open(tmp_path / "run").verify() == int(step)
    assert "SIGTERM" in errors and "25 s of grace" in errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_same_signal_again_aborts(number, tmp_path, start):
    trainer = start(TRAINER + LOOP, tmp_path / "run", 0)
    assert trainer.read_line() == "training"
    trainer.kill(number)
    assert trainer.read_line().startswith("left")
    trainer.kill(number)
    code, errors = trainer.end()
    assert code == -number, errors
    assert f"{signal.Signals(number).name} again" in errors


IN_A_C_CALL = """
signals._ECHO = float(echo)
ckpt.save(1, state).result(60)
train_step()
may_copy = threading.Event()
ckpt._snapshotter.pool.submit(may_copy.wait)
handle = ckpt.save(2, state)

def witness():
    assert not handle.wait_staged(0)
    say("copying")
    while not ckpt.should_save(3):
        time.sleep(0.002)
    say("noticed")
    may_copy.set()
    say(handle.result(60))

threading.Thread(target=witness, daemon=True).start()
libc.pthread_mutex_lock(locked)  # never returns
"""


def test_a_copy_is_finished_and_committed_while_the_main_thread_is_in_a_long_c_call(tmp_path, start):
    """... and even there the same signal again ends the process at once."""
    trainer = start(TRAINER + IN_A_C_CALL, tmp_path / "run", 0)
    assert trainer.read_line() == "copying"
    trainer.kill(signal.SIGTERM)
    assert trainer.read_line() == "noticed"
    assert trainer.read_line() == "committed"
    assert asyncckpt.open(tmp_path / "run").verify() == 2
    trainer.kill(signal.SIGTERM)
    code, errors = trainer.end()
    assert code == -signal.SIGTERM, errors
    assert "1 in flight" in errors and "fits into the 25 s of grace" in errors


HOLDING_THE_INTERPRETER = """
handle = ckpt.save(1, state)
assert handle.wait_staged(60)
say("holding")
ctypes.PyDLL(None).pthread_mutex_lock(locked)  # never returns
"""


def test_what_is_staged_is_committed_while_the_main_thread_holds_the_interpreter(tmp_path, start):
    """No thread of the trainer can run then; its writer does."""
    hold = Hold(tmp_path / "hold", "pwrite")
    trainer = start(TRAINER + HOLDING_THE_INTERPRETER, tmp_path / "run", "", *hold.command)
    hold.wait_reached()
    assert trainer.read_line() == "holding"
    trainer.kill(signal.SIGTERM)
    hold.release()
    until(lambda: asyncckpt.open(tmp_path / "run").steps() == [1])
    assert trainer.process.poll() is None


FORKING = """
loader = torch.utils.data.DataLoader(range(10**6), num_workers=2)
with ckpt:
    batches = iter(loader)
    next(batches)
    child = os.fork()
    if child:
        say("fork", child)
    else:
        say("child", signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, signal.set_wakeup_fd(-1))
        signal.pause()
    os.waitpid(child, 0)
    for worker in batches._workers:
        worker.terminate()
        worker.join()
    del batches
    ckpt.maybe_save(1, state)
    say("parent", ckpt.should_save(2))
"""


def test_a_signal_to_a_forked_child_is_none_to_the_trainer(tmp_path, start):
    trainer = start(TRAINER + FORKING, tmp_path / "run", "")
    lines = sorted(trainer.read_line() for _ in range(2))
    assert lines[0] == "child True -1"
    child = int(lines[1].split()[1])
    os.kill(child, signal.SIGTERM)
    assert trainer.read_line() == "parent False"
    code, errors = trainer.end()
    assert code == 0, errors
    assert asyncckpt.open(tmp_path / "run").steps() == []


def test_the_first_process_of_a_container_aborts_too(tmp_path):
    if subprocess.run(["unshare", "-pf", "true"], capture_output=True).returncode:
        pytest.skip("needs root: there may be no pid namespace")
    code = "import os, signal; from asyncckpt import signals\nassert os.getpid() == 1\nsignals.die_by(signal.SIGTERM)\n"
    done = subprocess.run(["unshare", "-pf", sys.executable, "-c", code], capture_output=True, timeout=PATIENCE)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr.decode()


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
