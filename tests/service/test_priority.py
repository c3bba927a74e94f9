"""The writer stands back while nobody waits for it, and does not while somebody does."""

import os
import signal
import sys
import threading
from pathlib import Path

import pytest
from support import processes
from support.models import training
from support.processes import PATIENCE, wait_for_end

import asyncckpt
from asyncckpt.write import client
from asyncckpt.writer import NICE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads are a Linux thing")
WRITER = str(Path(processes.__file__).with_name("priority_writer.py"))


@pytest.fixture
def priorities(tmp_path, monkeypatch):
    """Those at which data was written since the last call."""
    file = tmp_path / "priorities"
    monkeypatch.setattr(client, "COMMAND", [sys.executable, "-P", WRITER, str(file)])

    def priorities():
        found = {int(line) for line in file.read_text().split()}
        file.write_text("")
        return found

    return priorities


@pytest.fixture
def ckpt(tmp_path, priorities):
    with asyncckpt.Checkpointer(tmp_path / "run") as ckpt:
        yield ckpt


def save(ckpt, step):
    """Save without waiting as a user would, which raises the priority."""
    over = threading.Event()
    handle = ckpt.save(step, training())
    handle.add_done_callback(lambda _: over.set())
    assert over.wait(PATIENCE) and handle.outcome == "committed"


def test_low_while_nobody_waits_and_normal_while_somebody_does(ckpt, priorities):
    normal = os.getpriority(os.PRIO_PROCESS, 0)
    save(ckpt, 1)
    assert priorities() == {NICE}
    with ckpt._session.waiting():
        save(ckpt, 2)
    assert priorities() == {normal}
    save(ckpt, 3)
    assert priorities() == {NICE}


def test_a_writer_started_while_somebody_waits_hurries_too(ckpt, priorities):
    save(ckpt, 1)
    priorities()
    with ckpt._session.waiting():
        killed = ckpt.stats().writer_pid
        os.kill(killed, signal.SIGKILL)
        wait_for_end(killed)
        with ckpt._session._changed:
            assert ckpt._session._changed.wait_for(lambda: ckpt.stats().writer_pid is None, PATIENCE)
        save(ckpt, 2)
        assert priorities() == {os.getpriority(os.PRIO_PROCESS, 0)}
    save(ckpt, 3)
    assert priorities() == {NICE}
