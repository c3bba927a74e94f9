"""A notice to leave, in a real training process: what is staged is committed, a second signal aborts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from support.processes import PATIENCE, Hold, until

import asyncckpt
from asyncckpt import Preemption

USR1 = Preemption(signals=(signal.SIGUSR1,))
RARELY = asyncckpt.Every(steps=10**6)
pytestmark = pytest.mark.usefixtures("signals_are_left_as_they_were")


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
