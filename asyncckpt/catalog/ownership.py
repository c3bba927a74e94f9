"""Who may write a run: in a directory, the holder of a kernel lock on a file there; elsewhere see `lease`.

The kernel drops the lock when its holder dies, however it dies; no process id or age is ever trusted. The process
id in the file is for the error message only. The file itself is never removed.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Protocol

from asyncckpt.errors import ConflictError, StorageError
from asyncckpt.format import names
from asyncckpt.storage.base import Storage
from asyncckpt.storage.local import LocalStorage

_POLL = 0.05
_held: weakref.WeakSet[RunLock] = weakref.WeakSet()


class RunLock:
    """The held lock of the run in `directory`."""

    def __init__(self, directory: str, fd: int) -> None:
        self.directory = directory
        self._fd = fd
        _held.add(self)

    @classmethod
    def acquire(
        cls,
        directory: str,
        timeout: float,
        cancelled: threading.Event | None = None,
        waiting: Callable[[], None] = lambda: None,
    ) -> RunLock:
        """Wait up to `timeout` seconds for the run in `directory`, which must exist. `waiting` is called meanwhile.

        Raises:
            ConflictError: another writer still holds it.
            StorageError: the file system has no locks, or the file can't be opened.
        """
        deadline = time.monotonic() + timeout
        while True:
            fd = cls._try(directory)
            if fd is not None:
                return cls(directory, fd)
            waiting()
            if time.monotonic() >= deadline or (cancelled is not None and cancelled.is_set()):
                pid = cls.owner(directory)
                raise ConflictError(
                    f"{directory} is being written by another process (pid {pid or 'unknown'}), still after "
                    f"{timeout:g} s. Stop it, give this run a directory of its own, or raise lock_timeout.",
                    pid=pid,
                )
            time.sleep(_POLL)

    @staticmethod
    def _try(directory: str) -> int | None:
        path = os.path.join(directory, names.LOCK)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise StorageError(f"can't open {path}: {error.strerror}", errno=error.errno) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                os.ftruncate(fd, 0)
                os.pwrite(fd, b"%d\n" % os.getpid(), 0)
                return fd
        except (BlockingIOError, FileNotFoundError):
            pass  # held by another, or the file was replaced under us
        except OSError as error:
            os.close(fd)
            raise StorageError(
                f"can't lock {path}: {error.strerror}. Is this a file system without flock?", errno=error.errno
            ) from error
        os.close(fd)
        return None

    @staticmethod
    def owner(directory: str) -> int | None:
        """The process id that the lock file names, for a message to a person."""
        try:
            with open(os.path.join(directory, names.LOCK), "rb") as file:
                return int(file.read(32))
        except (OSError, ValueError):
            return None

    def check(self) -> None:
        """The kernel lets nobody else have it."""

    def release(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _let_go_in_child() -> None:
    """A fork shares the lock; were the child to keep its copy, the run would stay locked until the child ends."""
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_let_go_in_child)


class Ownership(Protocol):
    """What `own` gives."""

    def check(self) -> None:
        """
        Raises:
            ConflictError: the run is not this writer's any more.
            StorageError: that can't be found out.
        """

    def release(self) -> None: ...


def own(storage: Storage, timeout: float, cancelled: threading.Event | None = None) -> Ownership:
    """Wait up to `timeout` seconds for the run in `storage`; of a directory, make it.

    Raises:
        ConflictError: another writer still owns it.
        StorageError: it can't be used.
    """
    if isinstance(storage, LocalStorage):
        storage.make_root()
        return RunLock.acquire(storage.root, timeout, cancelled)
    from asyncckpt.catalog.lease import Lease
    from asyncckpt.storage.object import ObjectStorage

    assert isinstance(storage, ObjectStorage)
    return Lease.acquire(storage, timeout, cancelled)
