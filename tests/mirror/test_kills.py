"""Killed in the middle of mirroring: the writer that is left finishes, or the next start goes on from there."""

import os
import signal
import threading

import msgspec
import pytest
import torch
from support.processes import PATIENCE, Hold, until, wait_for_end

import asyncckpt
from asyncckpt.format import names
from asyncckpt.testing import RecordingPosix

PARTS, SIZE = 8, 1 << 18
TRAINER = """
import sys
import torch, asyncckpt
from asyncckpt.write import client

folder, mirror, *client.COMMAND = sys.argv[1:]
state = {f"part{i}": torch.arange(1 << 16, dtype=torch.float32) + i for i in range(8)}
ckpt = asyncckpt.Checkpointer(folder, mirror=mirror)
ckpt.save(1, state).result(60)
print(ckpt.stats().writer_pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def held(tmp_path, start):
    """A trainer whose writer stands still in the middle of mirroring step 1: the trainer, its writer, what holds it."""
    hold = Hold(tmp_path / "hold", "pwrite", 9, after="link")
    trainer = start(TRAINER, tmp_path / "run", tmp_path / "mirror", *hold.command)
    writer = int(trainer.read_line())
    hold.wait_reached()
    yield trainer, writer, hold
    hold.release()


def journal(tmp_path):
    """The files that are whole on the mirror, as is written down."""
    try:
        found = msgspec.json.decode((tmp_path / "run" / names.MIRRORING).read_bytes())
    except FileNotFoundError:
        return set()
    return {name for files in found["files"].values() for name in files}


def is_whole(tmp_path):
    run = asyncckpt.open(tmp_path / "mirror")
    loaded = asyncckpt.load(tmp_path / "mirror", 1)
    return run.verify(1) == 1 and all(loaded[f"part{i}"][0] == i for i in range(PARTS))


def test_the_writer_of_a_killed_trainer_mirrors_all(tmp_path, held):
    trainer, writer, hold = held
    trainer.kill(signal.SIGKILL)
    trainer.end()
    hold.release()
    wait_for_end(writer)
    assert is_whole(tmp_path)


def test_after_a_kill_of_both_whole_files_are_not_copied_again(tmp_path, held):
    trainer, writer, _ = held
    until(lambda: len(journal(tmp_path)) >= 3)
    os.kill(writer, signal.SIGKILL)
    trainer.kill(signal.SIGKILL)
    trainer.end()
    wait_for_end(writer)
    done, posix = journal(tmp_path), RecordingPosix()
    assert 3 <= len(done) < PARTS
    with pytest.raises(asyncckpt.CheckpointNotFoundError):
        asyncckpt.load(tmp_path / "mirror")
    options = {"mirror": tmp_path / "mirror", "mirror_keep": asyncckpt.Keep(last=1), "writer": "thread"}
    with asyncckpt.Checkpointer(tmp_path / "run", **options, _posix=posix) as ckpt:
        ckpt.wait_until_flushed(PATIENCE, tier="mirror")
        told = ckpt.stats().mirror
    assert is_whole(tmp_path)
    made = [op for op in posix.operations if op.verb == "create" and str(tmp_path / "mirror") in op.arguments[0]]
    copied = {os.path.basename(op.arguments[0]) for op in made} & {f"part{i}.safetensors" for i in range(PARTS)}
    assert copied == {f"part{i}.safetensors" for i in range(PARTS)} - done
    assert SIZE * len(copied) <= told.bytes < SIZE * len(copied) + 4096 * 2 * PARTS
    written = sum(len(op.data) for op in posix.operations if op.verb == "pwrite")
    assert written < SIZE * (len(copied) + 1)
    assert not (tmp_path / "run" / names.MIRRORING).exists()


def test_the_next_start_waits_for_the_run_and_not_for_the_mirror(tmp_path, held):
    """The writer that is left is still mirroring, here for ever; it gives way when its step is done."""
    trainer, writer, hold = held
    trainer.kill(signal.SIGKILL)
    trainer.end()
    with asyncckpt.Checkpointer(tmp_path / "run", mirror=tmp_path / "mirror", writer="thread") as ckpt:
        state = {f"part{i}": torch.zeros(1 << 16) for i in range(PARTS)}
        assert ckpt.restore(state) == 1
        handle = ckpt.save(2, state)
        assert handle.result(PATIENCE) == "committed"
        with pytest.raises(TimeoutError):
            handle.wait_mirrored(0.05)
        threading.Timer(0.1, hold.release).start()
        assert handle.wait_mirrored(PATIENCE) == "mirrored"
        wait_for_end(writer)
    assert asyncckpt.open(tmp_path / "mirror").steps() == [1, 2]
    assert is_whole(tmp_path)


def test_the_death_of_a_writer_is_told_and_the_next_one_goes_on(tmp_path, monkeypatch):
    hold = Hold(tmp_path / "hold", "pwrite", 2, after="link").install(monkeypatch)
    with asyncckpt.Checkpointer(tmp_path / "run", mirror=tmp_path / "mirror") as ckpt:
        handle = ckpt.save(1, {"x": torch.arange(10)})
        assert handle.result(PATIENCE) == "committed"
        hold.wait_reached()
        monkeypatch.undo()
        os.kill(ckpt.stats().writer_pid, signal.SIGKILL)
        with pytest.raises(asyncckpt.StorageError, match="killed by signal 9 before step 1 was mirrored"):
            handle.wait_mirrored(PATIENCE)
        ckpt.wait_until_flushed(PATIENCE, tier="mirror")
        assert asyncckpt.open(tmp_path / "mirror").steps() == [1]


def test_a_mirror_that_hangs_does_not_keep_the_writer_alive(tmp_path, monkeypatch):
    hold = Hold(tmp_path / "hold", "pwrite", 2, after="link").install(monkeypatch)
    ckpt = asyncckpt.Checkpointer(tmp_path / "run", mirror=tmp_path / "mirror", mirror_timeout=0.3)
    ckpt.save(1, {"x": torch.arange(10)}).result(PATIENCE)
    hold.wait_reached()
    writer = ckpt.stats().writer_pid
    with pytest.raises(asyncckpt.StorageError, match="slow or hung"):
        ckpt.close()
    wait_for_end(writer)
    assert asyncckpt.open(tmp_path / "run").verify() == 1
