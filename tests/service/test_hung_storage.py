"""Storage that hangs stalls training only as `when_full` allows, and whoever waits is told; then all goes on."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from support import processes
from support.models import train_step, training
from support.processes import PATIENCE, Hold, until, wait_for_end

import asyncckpt
from asyncckpt import link

AT_ONCE = 5.0
"""Seconds that a save may take on a loaded machine; one that waits for the storage takes for ever."""
TESTS = str(Path(processes.__file__).parents[1])


@pytest.fixture
def told(monkeypatch, caplog):
    """Whoever waits says so soon; returns what was said."""
    monkeypatch.setattr(link, "SLOW", 0.1)
    caplog.set_level(logging.WARNING)
    return lambda: [r.getMessage() for r in caplog.records if "slow or hung" in r.getMessage()]


def prompt(call):
    """The value of `call`, which must not wait."""
    begun = time.monotonic()
    value = call()
    assert time.monotonic() - begun < AT_ONCE
    return value


@pytest.mark.parametrize(
    ("verb", "after"),
    [("is_directory", "fsync_dir"), ("mkdir", "fsync_dir"), ("create", None), ("reserve", None), ("pwrite", None),
     ("truncate", None), ("fsync", None), ("fsync_dir", "fsync"), ("link", None), ("unlink", "link")],
)  # fmt: skip
def test_a_verb_that_does_not_return(tmp_path, monkeypatch, told, verb, after):
    """Saves are taken or skipped at once; waiting has its limit, and says what for."""
    hold = Hold(tmp_path / "hold", verb, after=after).install(monkeypatch)
    state = training()
    with asyncckpt.Checkpointer(tmp_path / "run", when_full="skip") as ckpt:
        handles = [prompt(lambda step=step: ckpt.save(step, state)) for step in (1, 2)]
        hold.wait_reached()
        for step in range(3, 8):
            train_step(state)
            handles.append(prompt(lambda step=step: ckpt.save(step, state)))
        assert [h.outcome for h in handles] == ["pending"] * 2 + ["skipped"] * 5
        with pytest.raises(asyncckpt.QueueFullError):
            prompt(lambda: ckpt.save(8, state, when_full="raise"))
        assert prompt(ckpt.stats).in_flight == 2
        assert handles[0].wait_staged(PATIENCE)
        with pytest.raises(TimeoutError):
            handles[0].result(0.01)
        with pytest.raises(TimeoutError, match="steps 1, 2"):
            ckpt.wait_until_flushed(timeout=0.3)
        said = [line for line in told() if "committed" in line]
        assert len(said) == 1 and str(tmp_path / "run") in said[0]
        hold.release()
        assert [h.result(PATIENCE) for h in handles[:2]] == ["committed"] * 2
        assert ckpt.save(8, state).result(PATIENCE) == "committed"
        assert ckpt.steps() == [1, 2, 8]


def test_a_save_that_waits_for_a_place_says_so(tmp_path, monkeypatch, told):
    hold = Hold(tmp_path / "hold", "fsync").install(monkeypatch)
    with asyncckpt.Checkpointer(tmp_path / "run", max_in_flight=1) as ckpt:
        ckpt.save(1, training())
        hold.wait_reached()
        threading.Timer(0.5, hold.release).start()
        handle = ckpt.save(2, training())
        assert handle.blocked > 0.2
        assert sum("place in the queue" in line for line in told()) == 1


def heard(told, before, what):
    return any(what in said for said in told()[before:])


def release_when(hold, condition):
    try:
        until(condition)
    finally:
        hold.release()


def test_opening_and_deleting_say_so(tmp_path, monkeypatch, told):
    with asyncckpt.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, training()).result(PATIENCE)
    for verb, what in (("listdir", "own the run"), ("unlink", "delete")):
        hold = Hold(tmp_path / verb, verb).install(monkeypatch)
        told_before = len(told())
        released = threading.Thread(target=release_when, args=(hold, partial(heard, told, told_before, what)))
        released.start()
        with asyncckpt.Checkpointer(tmp_path / "run") as ckpt:
            if verb == "unlink":
                ckpt.delete(1)
        released.join()
        assert heard(told, told_before, what), told()


def test_a_save_does_not_look_at_the_storage(tmp_path, monkeypatch):
    """Training would stand still where that hangs. Only a step that there is something of already is looked for."""
    state = training()
    with asyncckpt.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, state).result(PATIENCE)
    with asyncckpt.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(2, state).result(PATIENCE)

        def hang(*_, **__):
            raise AssertionError("the storage was looked at")

        with monkeypatch.context() as hung:
            for verb in ("listdir", "open", "is_directory", "is_link", "free_bytes", "size"):
                hung.setattr(ckpt._run.storage.posix, verb, hang)
            handles = [ckpt.save(step, state) for step in (3, 4, 5)]
        assert [handle.result(PATIENCE) for handle in handles] == ["committed"] * 3
        for step in (1, 2, 5):
            with pytest.raises(asyncckpt.CheckpointExistsError):
                ckpt.save(step, state)


def test_leaving_the_process_on_hung_storage_ends_and_says_what_is_lost(tmp_path, start):
    hold = Hold(tmp_path / "hold", "pwrite")
    source = """
import sys, torch, asyncckpt
from asyncckpt import checkpointer, link
from asyncckpt.write import client
client.COMMAND = sys.argv[2:]
checkpointer._EXIT_PATIENCE, link._GOODBYE = 0.3, 0.3
ckpt = asyncckpt.Checkpointer(sys.argv[1])
ckpt.save(1, {"x": torch.arange(1000.0)}).wait_staged(60)
print(ckpt.stats().writer_pid, flush=True)
"""
    trainer = start(source, tmp_path / "run", *hold.command)
    writer = int(trainer.read_line())
    hold.wait_reached()
    code, errors = trainer.end()
    assert code == 0
    assert "step 1 not committed at exit" in errors
    hold.release()  # and the writer, which lives on, has kept it all the same
    wait_for_end(writer)
    assert asyncckpt.open(tmp_path / "run").verify() == 1


def test_a_stopped_writer_goes_on_where_it_was(tmp_path, monkeypatch):
    """SIGSTOP in the middle of a write, and SIGCONT later."""
    hold = Hold(tmp_path / "hold", "pwrite").install(monkeypatch)
    state = training()
    with asyncckpt.Checkpointer(tmp_path / "run", when_full="skip") as ckpt:
        handles = [ckpt.save(step, state) for step in (1, 2)]
        hold.wait_reached()
        pid = ckpt.stats().writer_pid
        os.kill(pid, signal.SIGSTOP)
        hold.release()
        assert prompt(lambda: ckpt.save(3, state)).outcome == "skipped"
        with pytest.raises(TimeoutError):
            ckpt.wait_until_flushed(timeout=0.1)
        os.kill(pid, signal.SIGCONT)
        assert [handle.result(PATIENCE) for handle in handles] == ["committed"] * 2
        assert ckpt.stats().writer_pid == pid


def test_a_stopped_trainer_keeps_nothing_from_being_committed(tmp_path, start):
    hold = Hold(tmp_path / "hold", "pwrite")
    source = """
import sys, torch, asyncckpt
from asyncckpt.write import client
client.COMMAND = sys.argv[2:]
with asyncckpt.Checkpointer(sys.argv[1]) as ckpt:
    ckpt.save(1, {"x": torch.arange(1000.0)}).wait_staged(60)
    print("staged", flush=True)
    sys.stdin.readline()
    ckpt.save(2, {"x": torch.arange(1000.0)})
"""
    trainer = start(source, tmp_path / "run", *hold.command)
    assert trainer.read_line() == "staged"
    hold.wait_reached()
    trainer.kill(signal.SIGSTOP)
    hold.release()
    run = asyncckpt.open(tmp_path / "run")
    deadline = time.monotonic() + PATIENCE
    while not run.steps() and time.monotonic() < deadline:
        os.sched_yield()
    assert run.verify() == 1
    trainer.kill(signal.SIGCONT)
    trainer.process.stdin.write(b"\n")
    trainer.process.stdin.flush()
    assert trainer.end()[0] == 0
    assert run.verify() == 2


def test_a_frozen_file_system(tmp_path):
    """fsfreeze of a loop mount, by a process of its own: see `crash.frozen`."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs root: there may be no mount namespace")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([TESTS, str(Path(TESTS).parent)])}
    command = ["unshare", "-m", sys.executable, "-P", "-m", "crash.frozen", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stderr
