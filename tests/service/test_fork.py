"""After a fork the child gets an error, never a hang, and never the parent's run."""

import os
import select
import threading
import time

import pytest
from support.models import train_step, training
from support.processes import PATIENCE

import asyncckpt


def in_child(work):
    """What `work` returns in a forked child, as text; fails if it takes longer than a second."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            text = str(work())
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writing, text.encode())
        os._exit(0)
    os.close(writing)
    begun = time.monotonic()
    answered = select.select([reading], [], [], PATIENCE)[0]
    took = time.monotonic() - begun
    if not answered:
        os.kill(pid, 9)
    os.waitpid(pid, 0)
    answer = os.read(reading, 1 << 16).decode()
    os.close(reading)
    assert answered and took < 1, f"the child hung: {took} s"
    return answer


@pytest.fixture
def copying(tmp_path):
    """A Checkpointer with a copy under way that does not end."""
    state = training()
    with asyncckpt.Checkpointer(tmp_path / "run", overlap=True) as ckpt:
        ckpt.save(1, state).result(PATIENCE)
        blocked = threading.Event()
        ckpt._snapshotter.pool.submit(blocked.wait)
        handle = ckpt.save(2, state)
        yield ckpt, state, handle
        blocked.set()
        assert handle.result(PATIENCE) == "committed"
        assert ckpt.save(3, state).result(PATIENCE) == "committed"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_every_use_in_the_child_is_an_error_at_once(copying):
    ckpt, state, handle = copying
    uses = [
        lambda: ckpt.save(9, state),
        lambda: ckpt.wait_until_flushed(),
        lambda: ckpt.restore(state),
        lambda: ckpt.close(),
        lambda: ckpt.fence(),
        lambda: handle.result(),
        lambda: handle.wait_staged(),
    ]
    for use in uses:
        assert "CheckpointError" in in_child(use)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_training_goes_on_in_the_child(copying):
    _, state, _ = copying

    def step():
        for p in state["model"].parameters():
            p.grad = p.detach().clone()
        state["optimizer"].step()
        return "stepped"

    assert in_child(step) == "stepped"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_does_not_keep_the_run(tmp_path):
    """A forked worker outlives the Checkpointer; the run is free all the same."""
    ckpt = asyncckpt.Checkpointer(tmp_path / "run", writer="thread")
    state = training()
    train_step(state)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    ckpt.save(1, state)
    ckpt.close()
    with asyncckpt.Checkpointer(tmp_path / "run", lock_timeout=0) as second:
        assert second.latest() == 1
    os.close(writing)
    os.waitpid(pid, 0)
