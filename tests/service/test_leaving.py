"""Every way of leaving the process drains what is staged, or names what could not be saved on stderr."""

import signal

import pytest
from support.processes import wait_for_end

import asyncckpt

TRAINER = """
import os, signal, sys, threading
import torch, asyncckpt

folder, writer, how = sys.argv[1:]
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
    elif how == "close twice": ckpt.close(), ckpt.close()
    else:
        assert handle.wait_staged(60)
        if how == "os._exit": os._exit(5)
        if how == "SIGTERM": os.kill(os.getpid(), signal.SIGTERM)
        if how == "SIGINT": os.kill(os.getpid(), signal.SIGINT)
leave()
"""

EXIT = {"end": 0, "exception": 1, "sys.exit": 3, "with": 1, "del": 0, "thread": 0, "close twice": 0,
        "os._exit": 5, "SIGTERM": -signal.SIGTERM, "SIGINT": -signal.SIGINT}  # fmt: skip


@pytest.mark.parametrize("how", EXIT)
def test_with_the_writer_process(how, tmp_path, start):
    trainer = start(TRAINER, tmp_path / "run", "process", how)
    writer = int(trainer.read_line())
    code, errors = trainer.end()
    assert code == EXIT[how], errors
    wait_for_end(writer)
    assert asyncckpt.open(tmp_path / "run").verify() == (2 if how == "thread" else 1)
    assert "asyncckpt" not in errors.replace("asyncckpt.Checkpointer(", "")


@pytest.mark.parametrize("how", ["end", "exception", "sys.exit", "del"])
def test_with_the_writer_thread(how, tmp_path, start):
    trainer = start(TRAINER, tmp_path / "run", "thread", how)
    trainer.read_line()
    code, errors = trainer.end()
    assert code == EXIT[how], errors
    assert asyncckpt.open(tmp_path / "run").verify() == 1


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
