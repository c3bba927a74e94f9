"""A snapshot that was staged is committed although the trainer is killed the next instant."""

import os
import signal
import threading

import pytest
import torch
from support.processes import PATIENCE, Hold, wait_for_end

import asyncckpt

TRAINER = """
import os, sys, threading
import torch, asyncckpt
from asyncckpt.write import client

folder, phase, workers, *command = sys.argv[1:]
torch.manual_seed(0)
model = torch.nn.Sequential(*(torch.nn.Linear(128, 128) for _ in range(4)))
optimizer = torch.optim.AdamW(model.parameters())
state = {"model": model, "optimizer": optimizer}

def step():
    model(torch.randn(4, 128)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()

step()
with asyncckpt.Checkpointer(folder) as ckpt:
    ckpt.save(1, state).result(60)
step()
client.COMMAND = command or client.COMMAND
loader = torch.utils.data.DataLoader(range(100000), num_workers=int(workers))
batches = iter(loader)
ckpt = asyncckpt.Checkpointer(folder, overlap=True)
if int(workers):
    next(batches)
if phase == "copying":
    blocked = threading.Event()
    ckpt._snapshotter.pool.submit(blocked.wait)
handle = ckpt.save(2, state)
if int(workers):  # forked with the link of the writer in their hands
    batches = iter(loader)
    next(batches)
if phase != "copying":
    assert handle.wait_staged(60)
torch.save([p.detach() for p in model.parameters()], folder + "/../weights.pt")
held = [worker.pid for worker in batches._workers] if int(workers) else []
print("staged" if handle._staged.is_set() else "copying", ckpt.stats().writer_pid, *held, flush=True)
sys.stdin.read()
"""


def expected(tmp_path):
    return torch.load(tmp_path / "weights.pt", weights_only=True)


def restored(folder):
    return list(asyncckpt.load(folder, parts=["model"])["model"].values())


@pytest.mark.parametrize("how", ["kill", "killpg"])
@pytest.mark.parametrize(
    ("verb", "after"), [("create", None), ("pwrite", "create"), ("fsync", None), ("link", None), ("fsync_dir", "link")]
)
def test_killed_while_the_writer_is_at(verb, after, how, tmp_path, start):
    hold = Hold(tmp_path / "hold", verb, after=after)
    trainer = start(TRAINER, tmp_path / "run", "writing", 0, *hold.command)
    word, writer = trainer.read_line().split()
    assert word == "staged"
    hold.wait_reached()
    (os.killpg if how == "killpg" else os.kill)(trainer.pid, signal.SIGKILL)
    trainer.end()
    hold.release()
    wait_for_end(int(writer))
    assert asyncckpt.open(tmp_path / "run").verify() == 2
    assert all(torch.equal(a, b) for a, b in zip(restored(tmp_path / "run"), expected(tmp_path), strict=True))


def test_killed_with_data_loader_workers_alive(tmp_path, start):
    """They hold the writer's link open, here for ever: it must notice the trainer's death all the same."""
    hold = Hold(tmp_path / "hold", "pwrite", 1)
    trainer = start(TRAINER, tmp_path / "run", "writing", 2, *hold.command)
    word, writer, *workers = trainer.read_line().split()
    assert word == "staged" and len(workers) == 2
    hold.wait_reached()
    for worker in workers:
        os.kill(int(worker), signal.SIGSTOP)
    trainer.kill(signal.SIGKILL)
    hold.release()
    wait_for_end(int(writer))
    os.killpg(trainer.pid, signal.SIGKILL)
    trainer.end()
    assert asyncckpt.open(tmp_path / "run").verify() == 2


def test_killed_while_copying_the_snapshot_is_no_checkpoint(tmp_path, start):
    trainer = start(TRAINER, tmp_path / "run", "copying", 0)
    word, writer = trainer.read_line().split()
    assert word == "copying"
    trainer.kill(signal.SIGKILL)
    trainer.end()
    wait_for_end(int(writer))
    run = asyncckpt.open(tmp_path / "run")
    assert (run.steps(), run.verify()) == ([1], 1)


def test_the_next_start_waits_for_the_writer_left_over_and_gets_its_checkpoint(tmp_path, start):
    hold = Hold(tmp_path / "hold", "pwrite", 1)
    trainer = start(TRAINER, tmp_path / "run", "writing", 0, *hold.command)
    writer = int(trainer.read_line().split()[1])
    hold.wait_reached()
    trainer.kill(signal.SIGKILL)
    trainer.end()
    with pytest.raises(asyncckpt.ConflictError) as caught:
        asyncckpt.Checkpointer(tmp_path / "run", lock_timeout=0)
    assert caught.value.pid == writer
    threading.Timer(1.5, hold.release).start()  # about when the next one comes to wait
    model = torch.nn.Sequential(*(torch.nn.Linear(128, 128) for _ in range(4)))
    with asyncckpt.Checkpointer(tmp_path / "run", lock_timeout=PATIENCE) as ckpt:
        assert ckpt.restore({"model": model}, parts=["model"]) == 2
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected(tmp_path), strict=True))


def test_stopped_between_staging_and_kill_it_is_committed(tmp_path, start):
    """The writer has not even read the last message when the trainer dies."""
    stopping = TRAINER.replace("handle = ckpt.save(2", "os.kill(ckpt.stats().writer_pid, 19); handle = ckpt.save(2")
    trainer = start(stopping, tmp_path / "run", "writing", 0)
    word, writer = trainer.read_line().split()
    assert word == "staged"
    trainer.kill(signal.SIGKILL)
    trainer.end()
    os.kill(int(writer), signal.SIGCONT)
    wait_for_end(int(writer))
    assert asyncckpt.open(tmp_path / "run").verify() == 2
