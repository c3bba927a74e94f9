"""Who may write a run: real processes, real kills."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from asyncckpt.catalog.ownership import RunLock
from asyncckpt.errors import ConflictError, StorageError
from asyncckpt.format import names

HOLDER = """
import sys
from asyncckpt.catalog.ownership import RunLock
lock = RunLock.acquire(sys.argv[1], 10)
print("held", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def holder(run: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds `run` until its input ends or it is killed."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()
            process.wait(10)


def test_another_process_holds_it(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        begun = time.monotonic()
        with pytest.raises(ConflictError) as caught:
            RunLock.acquire(str(tmp_path), 0.2)
        assert caught.value.pid == process.pid
        assert str(process.pid) in str(caught.value) and str(tmp_path) in str(caught.value)
        assert time.monotonic() - begun >= 0.2
        assert RunLock.owner(str(tmp_path)) == process.pid


def test_the_same_process_holds_it(tmp_path: Path) -> None:
    lock = RunLock.acquire(str(tmp_path), 0)
    with pytest.raises(ConflictError) as caught:
        RunLock.acquire(str(tmp_path), 0)
    assert caught.value.pid == os.getpid()
    lock.release()
    lock.release()
    RunLock.acquire(str(tmp_path), 0).release()


def test_killing_the_holder_frees_it(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        RunLock.acquire(str(tmp_path), 10).release()


def test_a_waiter_gets_it_when_the_holder_goes(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        got: list[RunLock] = []
        waiter = threading.Thread(target=lambda: got.append(RunLock.acquire(str(tmp_path), 30)))
        waiter.start()
        assert process.stdin is not None
        process.stdin.close()
        waiter.join(30)
        assert len(got) == 1
        got[0].release()


def test_a_wait_can_be_cancelled(tmp_path: Path) -> None:
    with holder(tmp_path):
        cancelled = threading.Event()
        cancelled.set()
        with pytest.raises(ConflictError):
            RunLock.acquire(str(tmp_path), 3600, cancelled)


@pytest.mark.parametrize("content", [b"%d\n" % os.getppid(), b"1\n", b"", b"nonsense", b"9" * 500])
def test_what_the_file_says_is_no_obstacle(tmp_path: Path, content: bytes) -> None:
    """A stale file that names a live process (its id was used again) must not lock anybody out."""
    (tmp_path / names.LOCK).write_bytes(content)
    lock = RunLock.acquire(str(tmp_path), 0)
    assert RunLock.owner(str(tmp_path)) == os.getpid()
    lock.release()


def test_a_forked_child_does_not_keep_it(tmp_path: Path) -> None:
    lock = RunLock.acquire(str(tmp_path), 0)
    hold, let_go = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(let_go)
        os.read(hold, 1)
        os._exit(0)
    try:
        with pytest.raises(ConflictError):  # the child's going out of the way frees nothing
            RunLock.acquire(str(tmp_path), 0)
        lock.release()
        RunLock.acquire(str(tmp_path), 10).release()
    finally:
        os.close(let_go)
        os.close(hold)
        os.waitpid(child, 0)


def test_a_process_started_meanwhile_does_not_keep_it(tmp_path: Path) -> None:
    lock = RunLock.acquire(str(tmp_path), 0)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, close_fds=False):
        lock.release()
        RunLock.acquire(str(tmp_path), 0).release()


def test_a_replaced_lock_file_is_not_mistaken_for_the_real_one(tmp_path: Path) -> None:
    lock = RunLock.acquire(str(tmp_path), 0)
    (tmp_path / names.LOCK).unlink()
    other = RunLock.acquire(str(tmp_path), 0)
    lock.release()
    with pytest.raises(ConflictError):
        RunLock.acquire(str(tmp_path), 0)
    other.release()


def test_the_file_is_private_and_stays(tmp_path: Path) -> None:
    RunLock.acquire(str(tmp_path), 0).release()
    assert (tmp_path / names.LOCK).stat().st_mode & 0o777 == 0o600


def test_a_link_or_no_folder_is_an_error_at_once(tmp_path: Path) -> None:
    (tmp_path / names.LOCK).symlink_to(tmp_path / "elsewhere")
    for run in (tmp_path, tmp_path / "none"):
        with pytest.raises(StorageError):
            RunLock.acquire(str(run), 60)
    assert not (tmp_path / "elsewhere").exists()
