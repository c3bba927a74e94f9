"""The public surface: what is exported, what a first look costs, what a waiting person sees."""

import io
import os
import subprocess
import sys

import pytest
import torch
from support.models import training
from support.processes import PATIENCE, Hold

import asyncckpt
from asyncckpt import progress

EXPORTED = {
    "Checkpointer", "SaveHandle", "Timeline", "Stats", "Auto", "Cadence", "Every", "Moment", "Preemption", "Keep",
    "RngState", "Run", "load", "open", "restore", "Record",
    "CheckpointError", "CheckpointExistsError", "CheckpointNotFoundError", "ConflictError", "CorruptCheckpointError",
    "NotSupportedError", "QueueFullError", "RankError", "StateMismatchError", "StorageError", "TornSnapshotError",
    "UnsupportedStateError",
    "CheckpointBusyError",
}  # fmt: skip


def test_exported_members():
    assert set(asyncckpt.__all__) == EXPORTED
    for name in EXPORTED:
        member = getattr(asyncckpt, name)
        assert member.__doc__
        assert set(dir(asyncckpt)) >= EXPORTED
    with pytest.raises(AttributeError, match="nothing"):
        asyncckpt.nothing  # noqa: B018


def test_importing_the_package_loads_no_torch():
    code = "import sys, asyncckpt; asyncckpt.CheckpointError, asyncckpt.Keep; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_writer_process_loads_no_torch_and_listens_on_no_port(tmp_path):
    with asyncckpt.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, training()).result(PATIENCE)
        pid = ckpt.stats().writer_pid
        with open(f"/proc/{pid}/maps") as maps:
            assert "libtorch" not in maps.read()
        inodes = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
        for table in ("tcp", "tcp6", "udp", "udp6"):
            with open(f"/proc/net/{table}") as file:
                for line in file.readlines()[1:]:
                    assert f"socket:[{line.split()[9]}]" not in inodes


def test_files_are_for_their_owner_only(tmp_path):
    with asyncckpt.Checkpointer(tmp_path / "new" / "run") as ckpt:
        ckpt.save(1, training()).result(PATIENCE)
    for folder, _, files in os.walk(tmp_path / "new"):
        assert os.stat(folder).st_mode & 0o777 == 0o700
        for file in files:
            assert os.stat(os.path.join(folder, file)).st_mode & 0o777 == 0o600


def test_stats_are_a_reading_that_does_not_change(tmp_path):
    with asyncckpt.Checkpointer(tmp_path / "run", overlap=False) as ckpt:
        before = ckpt.stats()
        handle = ckpt.save(1, training())
        handle.result(PATIENCE)
        after = ckpt.stats()
        assert (before.saves, after.saves, after.committed, after.failed) == (0, 1, 1, 0)
        assert after.bytes_committed == handle.timeline.size > 0
        assert after.blocked_last == handle.blocked > 0
        assert after.bytes_per_second > 0
        assert after.overlap is False
        with pytest.raises(AttributeError):
            after.saves = 7


def test_the_timeline_of_a_save_is_in_order(tmp_path):
    with asyncckpt.Checkpointer(tmp_path / "run") as ckpt:
        for step in range(5):
            handle = ckpt.save(step, training())
            handle.result(PATIENCE)
            t = handle.timeline
            assert t.saved <= t.copy_begin <= t.copy_end <= t.write_end <= t.commit_end
            assert t.write_begin <= t.write_end


def test_auto_overlap_tries_both_and_settles(tmp_path):
    from support.models import train_step

    state = training()
    with asyncckpt.Checkpointer(tmp_path / "run", keep=asyncckpt.Keep(last=1)) as ckpt:
        assert ckpt.stats().overlap is None
        step = 0
        while ckpt.stats().overlap is None and step < 200:
            step += 1
            train_step(state)
            if step % 4 == 0:
                ckpt.save(step, state)
        assert ckpt.stats().overlap in (True, False)


@pytest.mark.parametrize("overlap", [True, False])
def test_copies_by_several_threads_are_whole(overlap, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        state = {"a": torch.randint(0, 1 << 40, (5 << 20,)), "b": [torch.arange(n) for n in range(300)]}
        with asyncckpt.Checkpointer(tmp_path / "run", overlap=overlap, writer="thread") as ckpt:
            for step in range(3):
                state["a"].add_(1)
                ckpt.save(step, state)
                expected = state["a"].clone()
            ckpt.wait_until_flushed(PATIENCE)
            loaded = asyncckpt.load(tmp_path / "run", 2)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(loaded["a"], expected)
    assert all(torch.equal(a, b) for a, b in zip(loaded["b"], state["b"], strict=True))


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_whoever_waits_at_a_terminal_sees_a_bar(terminal, tmp_path, monkeypatch):
    hold = Hold(tmp_path / "hold", "pwrite").install(monkeypatch)
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    screen = Terminal() if terminal else io.StringIO()
    with asyncckpt.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, training())
        hold.wait_reached()
        monkeypatch.setattr(sys, "stderr", screen)
        with pytest.raises(TimeoutError):
            ckpt.wait_until_flushed(timeout=0.6)
        monkeypatch.undo()
        hold.release()
        ckpt.wait_until_flushed(PATIENCE)
    assert ("writing checkpoints" in screen.getvalue()) is terminal
