"""Every way of leaving the process drains what is staged, or names what could not be saved on stderr."""

import signal

import pytest
from support.processes import Hold, wait_for_end

import asyncckpt

TRAINER = """
import os, resource, signal, sys, threading
import torch, asyncckpt

folder, writer, how, *program = sys.argv[1:]
signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup and shells start tests with these ignored
signal.signal(signal.SIGHUP, signal.SIG_DFL)
ckpt = asyncckpt.Checkpointer(folder, writer=writer, overlap=True)
handle = ckpt.save(1, {"x": torch.arange(100000.0)})
pid = ckpt.stats().writer_pid
print(pid, flush=True)

def leave():
    if how == "end": pass
    elif how == "exception": raise RuntimeError("planted")
    elif how == "sys.exit": sys.exit(3)
    elif how == "with":
        with ckpt: raise RuntimeError("planted")
    elif how == "del":
        global handle
        globals().pop("ckpt"), globals().pop("handle")
    elif how == "thread":
        thread = threading.Thread(target=lambda: ckpt.save(2, {"x": torch.zeros(9)}))
        thread.start()
        thread.join()
    elif how == "daemon thread":
        going = threading.Event()
        def save_for_ever():
            for step in range(2, 10**6):
                ckpt.save(step, {"x": torch.zeros(9)})
                if step == 10: going.set()
        threading.Thread(target=save_for_ever, daemon=True).start()
        assert going.wait(60)
    elif how == "close twice": ckpt.close(), ckpt.close()
    else:
        assert handle.wait_staged(60)
        if how == "os._exit": os._exit(5)
        if how == "os.execv": os.execv(sys.executable, [sys.executable, "-c", *program])
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.kill(os.getpid(), signal.Signals[how])
leave()
"""
AGAIN = """
import sys, torch, asyncckpt
state = {"x": torch.zeros(100000)}
with asyncckpt.Checkpointer(sys.argv[1], lock_timeout=60) as ckpt:
    assert ckpt.restore(state) == 1 and torch.equal(state["x"], torch.arange(100000.0))
sys.exit(7)
"""
"""What the process becomes: the same run, resumed."""

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGABRT")
EXIT = {"end": 0, "exception": 1, "sys.exit": 3, "with": 1, "del": 0, "thread": 0, "daemon thread": 0, "close twice": 0,
        "os._exit": 5, "os.execv": 7, **{name: -signal.Signals[name] for name in SIGNALS}}  # fmt: skip


@pytest.mark.parametrize("how", EXIT)
def test_with_the_writer_process(how, tmp_path, start):
    run = tmp_path / "run"
    trainer = start(TRAINER, run, "process", how, AGAIN, run)
    writer = int(trainer.read_line())
    code, errors = trainer.end()
    assert code == EXIT[how], errors
    wait_for_end(writer)
    newest = asyncckpt.open(run).verify()
    assert newest >= 8 if how == "daemon thread" else newest == (2 if how == "thread" else 1)
    if how != "daemon thread":  # which is told that there is nothing to save with any more
        assert "asyncckpt" not in errors.replace("asyncckpt.Checkpointer(", "")


def test_a_forked_child_leaves_at_once_and_takes_nothing_along(tmp_path, start):
    """It runs the exit handlers of its parent, while the save of that is held in mid-air."""
    hold = Hold(tmp_path / "hold", "pwrite")
    source = """
import os, sys, torch, asyncckpt
from asyncckpt.write import client
client.COMMAND = sys.argv[2:]
ckpt = asyncckpt.Checkpointer(sys.argv[1])
handle = ckpt.save(1, {"x": torch.arange(1000.0)})
assert handle.wait_staged(60)
child = os.fork()
if child == 0:
    sys.exit(3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), handle.outcome, flush=True)
assert handle.result(60) == "committed"
"""
    trainer = start(source, tmp_path / "run", *hold.command)
    assert trainer.read_line() == "3 pending"
    hold.wait_reached()
    hold.release()
    code, errors = trainer.end()
    assert (code, errors) == (0, "")
    assert asyncckpt.open(tmp_path / "run").verify() == 1


@pytest.mark.parametrize("how", ["end", "exception", "sys.exit", "del", "daemon thread"])
def test_with_the_writer_thread(how, tmp_path, start):
    trainer = start(TRAINER, tmp_path / "run", "thread", how)
    trainer.read_line()
    code, errors = trainer.end()
    assert code == EXIT[how], errors
    newest = asyncckpt.open(tmp_path / "run").verify()
    assert newest >= 8 if how == "daemon thread" else newest == 1


def test_what_could_not_be_saved_is_named_on_stderr(tmp_path, start):
    source = TRAINER.replace(
        "ckpt = asyncckpt.Checkpointer(folder,",
        "from asyncckpt.storage.posix import Posix\n"
        "class Full(Posix):\n"
        "    def fsync(self, fd): raise OSError(28, 'No space left on device')\n"
        "ckpt = asyncckpt.Checkpointer(folder, _posix=Full(),",
    )
    trainer = start(source, tmp_path / "run", "thread", "end")
    trainer.read_line()
    code, errors = trainer.end()
    assert code == 0
    assert "No space left" in errors
    assert "step" in errors
    assert asyncckpt.open(tmp_path / "run").steps() == []
