"""Limits of the system are exceptions, never a death by signal; when they are lifted, the next save works."""

import os
import resource
import signal
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from support.models import training
from support.processes import PATIENCE, until

import asyncckpt
from asyncckpt.write import client

STATE = {"x": torch.arange(1 << 18)}  # 2 MiB
PREEMPT = asyncckpt.Preemption(signals=(signal.SIGUSR2,))
SHM = """
import os, sys, torch, asyncckpt
assert os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize <= 65536
state = {"x": torch.arange(1 << 18)}
with asyncckpt.Checkpointer(sys.argv[1]) as ckpt:
    for step in (1, 2, 3):
        assert ckpt.save(step, state).result(60) == "committed"
    assert ckpt.verify() == 3
assert torch.equal(asyncckpt.load(sys.argv[1])["x"], state["x"])
"""
IN_CGROUP = """
import sys, torch, asyncckpt
from asyncckpt.snapshot.available import available_memory
folder, limit, procs = sys.argv[1:]
small, large = {"x": torch.arange(1 << 18)}, {"x": torch.zeros(48 << 20)}
ckpt = asyncckpt.Checkpointer(folder)
ckpt.save(1, small).result(60)
with open(procs, "w") as file:  # from here on what it takes counts
    file.write("0")
assert available_memory() <= int(limit), available_memory()
try:
    ckpt.save(2, large)
except asyncckpt.CheckpointError as error:
    assert "bytes of memory" in str(error), error
else:
    raise AssertionError("192 MiB were taken, and the limit is less")
assert ckpt.save(2, small).result(60) == "committed"
ckpt.close()
"""


@pytest.fixture
def cgroup():
    """A folder of a new cgroup with a limit of memory, and the limit."""
    for root, name in (("/sys/fs/cgroup", "memory.max"), ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")):
        folder = Path(root, f"asyncckpt-test-{os.getpid()}")
        if not Path(root, "cgroup.procs").exists():
            continue
        try:
            folder.mkdir()
            (folder / name).write_text(str(160 << 20))
        except OSError:
            with suppress(OSError):
                folder.rmdir()
            continue
        yield folder, 160 << 20
        folder.rmdir()
        return
    pytest.skip("needs root, and a cgroup file system that may be written to")


def test_a_limit_of_the_cgroup_is_told_before_it_is_met(tmp_path, cgroup):
    """Beyond it nothing is told: a process is killed. (Arenas count where they are touched first: in the trainer.)"""
    folder, most = cgroup
    arguments = [str(tmp_path / "run"), str(most), str(folder / "cgroup.procs")]
    done = subprocess.run([sys.executable, "-c", IN_CGROUP, *arguments], capture_output=True, timeout=100)
    assert done.returncode == 0, done.stderr.decode()


def test_a_small_dev_shm_does_not_matter(tmp_path):
    """Arenas are memfds: no place is needed there."""
    script = 'mount -t tmpfs -o size=64k tmpfs /dev/shm || exit 77; exec "$@"'
    command = ["unshare", "-m", "sh", "-c", script, "sh", sys.executable, "-c", SHM, str(tmp_path / "run")]
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs root: there may be no mount namespace")
    done = subprocess.run(command, capture_output=True, timeout=100)
    if done.returncode == 77:
        pytest.skip(f"needs root to mount: {done.stderr.decode()}")
    assert done.returncode == 0, done.stderr.decode()


@contextmanager
def limit(pid, what, value):
    """While inside, the process `pid` has a soft limit."""
    before = resource.prlimit(pid, what)
    resource.prlimit(pid, what, (value, before[1]))
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            resource.prlimit(pid, what, before)


def test_a_limit_of_file_size_fails_the_save_and_leaves_the_writer(tmp_path):
    with asyncckpt.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, {"y": 1}).result(PATIENCE)
        writer = ckpt.stats().writer_pid
        with limit(writer, resource.RLIMIT_FSIZE, 1 << 20):
            handle = ckpt.save(2, STATE)
            with pytest.raises(asyncckpt.StorageError, match="File too large"):
                handle.result(PATIENCE)
        assert ckpt.stats().writer_pid == writer
        assert ckpt.steps() == [1]
        assert ckpt.save(2, STATE).result(PATIENCE) == "committed"
        assert ckpt.verify() == 2


def address_space(pid):
    """Bytes."""
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmSize"))


@pytest.mark.parametrize("what", ["files", "address space"])
def test_a_writer_that_can_take_no_arena_is_told_and_replaced(tmp_path, what):
    with asyncckpt.Checkpointer(tmp_path / "run") as ckpt:
        writer = ckpt.stats().writer_pid
        limits = {
            "files": (resource.RLIMIT_NOFILE, 3),
            "address space": (resource.RLIMIT_AS, address_space(writer) + (1 << 20)),
        }
        with limit(writer, *limits[what]):
            with pytest.raises(asyncckpt.StorageError, match=r"the writer .* before step 1"):
                ckpt.save(1, STATE).result(PATIENCE)
            assert ckpt.steps() == []
            assert ckpt.save(1, STATE).result(PATIENCE) == "committed"
        assert ckpt.stats().writer_pid != writer


def test_a_writer_that_dies_of_an_arena_leaves_none_to_the_next(tmp_path, monkeypatch):
    """Its end is heard of before the call that gave it the arena has returned."""
    with asyncckpt.Checkpointer(tmp_path / "run", on_error="warn") as ckpt:
        with monkeypatch.context() as deadly:
            share = client.ProcessWriter.share

            def share_and_die(self, arena):
                share(self, arena)
                os.kill(self.pid, signal.SIGKILL)
                assert self.join(PATIENCE)

            deadly.setattr(client.ProcessWriter, "share", share_and_die)
            with pytest.raises(asyncckpt.StorageError, match=r"the writer .* before step 1"):
                ckpt.save(1, STATE).result(PATIENCE)
        assert ckpt.save(1, STATE).result(PATIENCE) == "committed" and ckpt.verify() == 1


@pytest.mark.parametrize("what", ["ulimit -v 40000", "ulimit -n 5"])
def test_a_writer_that_cannot_even_start_is_told(tmp_path, monkeypatch, what):
    """It has the limits of its trainer, which may be met by anything in it, an import as well as a thread."""
    with monkeypatch.context() as limited:
        limited.setattr(client, "COMMAND", ["sh", "-c", f'{what}; exec "$0" "$@"', *client.COMMAND])
        with pytest.raises(asyncckpt.StorageError, match="before it owned the run"):
            asyncckpt.Checkpointer(tmp_path / "run")
    with asyncckpt.Checkpointer(tmp_path / "run", lock_timeout=PATIENCE) as ckpt:
        assert ckpt.save(1, STATE).result(PATIENCE) == "committed"


@pytest.mark.parametrize("writer", ["process", "thread"])
def test_too_little_address_space_for_a_snapshot_is_a_clear_error(tmp_path, writer):
    large = torch.zeros(128 << 20)
    with asyncckpt.Checkpointer(tmp_path / "run", writer=writer) as ckpt:
        with (
            limit(0, resource.RLIMIT_AS, address_space("self") + (64 << 20)),
            pytest.raises(asyncckpt.CheckpointError, match="no memory"),
        ):
            ckpt.save(1, {"x": large})
        assert ckpt.save(1, STATE).result(PATIENCE) == "committed"


@pytest.mark.parametrize("late", [False, True])
def test_a_first_save_needs_no_memory_but_its_arena(tmp_path, late):
    """Where there is more, what is copied before `save` returns is set aside first, so that it returns sooner."""
    size = 256 << 20
    state = {"x": torch.arange(size // 4, dtype=torch.int32), **(training() if late else {})}
    with asyncckpt.Checkpointer(tmp_path / "run", overlap=True) as ckpt:
        with limit(0, resource.RLIMIT_AS, address_space("self") + size * 3 // 2):
            handle = ckpt.save(1, state)
            ckpt.fence()
        state["x"].zero_()
        assert handle.result(PATIENCE) == "committed"
    there = asyncckpt.load(tmp_path / "run", parts=["x"])["x"]
    assert torch.equal(there, torch.arange(size // 4, dtype=torch.int32))


@contextmanager
def files_left(count):
    """While inside, this process can open so many files more."""
    taken = [os.open(os.devnull, os.O_RDONLY) for _ in range(40)]
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    try:
        with limit(0, resource.RLIMIT_NOFILE, highest + 1):
            with suppress(OSError):
                while True:  # what holes there are
                    taken.append(os.dup(taken[0]))
            for fd in taken[:count]:
                os.close(fd)
            del taken[:count]
            yield
    finally:
        for fd in taken:
            os.close(fd)


@pytest.mark.parametrize("writer", ["process", "thread"])
def test_with_few_files_left_to_open_all_is_a_clear_error_or_done(tmp_path, writer):
    """Whatever count of them is left, at the start or later: nothing hangs, nothing stays behind, no bare OSError."""
    state = {"x": torch.arange(5000)}
    ends = Counter()

    def attempt(what, deed):
        try:
            deed()
        except asyncckpt.CheckpointError:
            ends[f"{what} refused"] += 1
        else:
            ends[f"{what} done"] += 1

    for left in (*range(9), 12, 24):
        run = tmp_path / str(left)
        with asyncckpt.Checkpointer(run, writer=writer) as ckpt:
            with files_left(left):
                attempt("save", lambda ckpt=ckpt: ckpt.save(1, state).result(PATIENCE))
                attempt("steps", ckpt.steps)
            assert ckpt.save(2, state).result(PATIENCE) == "committed"
        before = len(os.listdir("/proc/self/fd"))
        with files_left(left):
            attempt("open", lambda run=run: asyncckpt.Checkpointer(run, writer=writer, preempt=PREEMPT).close())
            attempt("restore", lambda run=run: asyncckpt.restore(run, dict(state)))
        until(lambda before=before: len(os.listdir("/proc/self/fd")) <= before)
        with asyncckpt.Checkpointer(run, writer=writer, lock_timeout=PATIENCE) as ckpt:
            assert ckpt.latest() == 2
    assert all(ends[f"{what} done"] for what in ("save", "steps", "open", "restore")), ends
    assert ends["open refused"] and ends["restore refused"], ends  # a save may find files that were closed just now
