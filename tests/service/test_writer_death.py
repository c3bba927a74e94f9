"""A dead writer is never success: what was in flight has failed, is told, and the next save starts a new writer."""

import os
import signal

import pytest
from support.models import train_step, training
from support.processes import PATIENCE, Hold

import asyncckpt

POINTS = [
    ("create", None),
    ("reserve", None),
    ("pwrite", None),
    ("fsync", None),
    ("fsync_dir", "fsync"),
    ("link", None),
]


@pytest.mark.parametrize(("verb", "after"), POINTS)
def test_killed_at(verb, after, tmp_path, monkeypatch):
    state = training()
    with asyncckpt.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, state).result(PATIENCE)
    train_step(state)
    hold = Hold(tmp_path / "hold", verb, after=after).install(monkeypatch)
    with asyncckpt.Checkpointer(tmp_path / "run") as ckpt:
        handle = ckpt.save(2, state)
        hold.wait_reached()
        killed = ckpt.stats().writer_pid
        monkeypatch.undo()
        os.kill(killed, signal.SIGKILL)
        with pytest.raises(asyncckpt.StorageError, match="killed by signal 9"):
            handle.result(PATIENCE)
        assert ckpt.steps() == [1]
        assert ckpt.verify() == 1
        assert ckpt.save(2, state).result(PATIENCE) == "committed"
        assert ckpt.stats().writer_pid not in (None, killed)
        assert ckpt.verify() == 2
        assert len(list((tmp_path / "run" / "step-00000002").iterdir())) == 2  # the leftovers are gone


def test_killed_after_publishing_the_save_has_failed_and_the_checkpoint_is_whole(tmp_path, monkeypatch):
    """Its durability is unknown, so it is not reported committed; it may be there all the same, never torn."""
    state = training()
    hold = Hold(tmp_path / "hold", "fsync_dir", after="link").install(monkeypatch)
    with asyncckpt.Checkpointer(tmp_path / "run") as ckpt:
        handle = ckpt.save(1, state)
        hold.wait_reached()
        assert ckpt.steps() == [1]
        os.kill(ckpt.stats().writer_pid, signal.SIGKILL)
        with pytest.raises(asyncckpt.StorageError):
            handle.result(PATIENCE)
        assert ckpt.verify() == 1


def test_killed_while_idle_is_noticed_by_the_next_save(tmp_path):
    state = training()
    with asyncckpt.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, state).result(PATIENCE)
        os.kill(ckpt.stats().writer_pid, signal.SIGKILL)
        for step in (2, 3):  # the first may be sent before the death is heard of
            try:
                assert ckpt.save(step, state).result(PATIENCE) == "committed"
            except asyncckpt.StorageError as error:
                assert "killed by signal 9" in str(error)
        assert 3 in ckpt.steps()
        assert ckpt.verify() == 3


def test_killed_with_the_queue_full_every_save_in_it_is_told(tmp_path, monkeypatch):
    state = training()
    hold = Hold(tmp_path / "hold", "pwrite", 1).install(monkeypatch)
    with asyncckpt.Checkpointer(tmp_path / "run", max_in_flight=3) as ckpt:
        handles = [ckpt.save(step, state) for step in (1, 2, 3)]
        hold.wait_reached()
        os.kill(ckpt.stats().writer_pid, signal.SIGKILL)
        for handle in handles:
            with pytest.raises(asyncckpt.StorageError, match=f"step {handle.step}"):
                handle.result(PATIENCE)
        monkeypatch.undo()
        assert [ckpt.save(step, state).result(PATIENCE) for step in (1, 2, 3)] == ["committed"] * 3


def test_a_stopped_writer_stalls_nobody_but_who_waits(tmp_path):
    state = training()
    with asyncckpt.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, state).result(PATIENCE)
        os.kill(ckpt.stats().writer_pid, signal.SIGSTOP)
        handle = ckpt.save(2, state, when_full="skip")
        assert handle.wait_staged(PATIENCE)
        with pytest.raises(TimeoutError, match="step 2"):
            ckpt.wait_until_flushed(timeout=0.1)
        os.kill(ckpt.stats().writer_pid, signal.SIGCONT)
        ckpt.wait_until_flushed(PATIENCE)
        assert handle.outcome == "committed"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_for_the_trainers_group_leave_the_writer(number, tmp_path):
    state = training()
    with asyncckpt.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, state).result(PATIENCE)
        pid = ckpt.stats().writer_pid
        assert os.getpgid(pid) != os.getpgid(0)
        assert os.getsid(pid) != os.getsid(0)
        os.kill(pid, number)
        assert ckpt.save(2, state).result(PATIENCE) == "committed"
        assert ckpt.stats().writer_pid == pid


def test_a_failing_service_thread_is_told_and_replaced(tmp_path, monkeypatch):
    from asyncckpt.write.service import Service

    state = training()
    with asyncckpt.Checkpointer(tmp_path / "run", writer="thread") as ckpt:
        ckpt.save(1, state).result(PATIENCE)

        async def broken(self, save):
            raise RuntimeError("planted")

        monkeypatch.setattr(Service, "_write", broken)
        handle = ckpt.save(2, state)
        with pytest.raises(asyncckpt.StorageError, match="planted"):
            handle.result(PATIENCE)
        monkeypatch.undo()
        assert ckpt.save(2, state).result(PATIENCE) == "committed"
