"""Locks of this machine for what lies elsewhere: object stores have none that the kernel drops with their holder.

They are held directories below one of this user's, in the directory for temporary files: what `LocalStorage` does with
the folders of a run. Whoever holds one alone removes it at the end.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import threading
import weakref

from asyncckpt.errors import StorageError
from asyncckpt.storage.files import named
from asyncckpt.storage.posix import Posix

_held: weakref.WeakSet[MachineHold] = weakref.WeakSet()


class MachineHold:
    """Let go of at the latest when nobody refers to it any more."""

    def __init__(self, path: str, fd: int, exclusive: bool) -> None:
        self._path, self._fd, self._exclusive = path, fd, exclusive
        self._lock = threading.Lock()
        _held.add(self)

    def close(self) -> None:
        with self._lock:
            fd, self._fd = self._fd, -1
        if fd < 0:
            return
        if self._exclusive:
            with contextlib.suppress(OSError):
                os.rmdir(self._path)
        os.close(fd)

    def _forget(self) -> None:
        """In a forked child: the hold is that of the parent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> MachineHold:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class MachineHolds:
    """The locks for what lies at `url`."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._posix = Posix()

    @property
    def machine(self) -> str:
        """The same for all processes that see each other's holds, on this boot of this machine, and for no others."""
        found = os.stat(self._home())
        try:
            with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
                boot = file.read().strip()
        except OSError:
            boot = ""
        return f"{boot}/{found.st_dev}/{found.st_ino}"

    def hold(self, name: str, *, exclusive: bool = False, wait: bool = True) -> MachineHold | None:
        """See `Storage.hold`.

        Raises:
            StorageError: the directory for temporary files can't be used.
        """
        path = os.path.join(self._home(), hashlib.sha256(f"{self._url}\n{name}".encode()).hexdigest()[:32])
        with named("lock", path):
            while True:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(path, 0o700)
                try:
                    fd = self._posix.lock(path, exclusive, wait)
                except BlockingIOError:
                    return None
                except FileNotFoundError:
                    continue  # whoever held it alone has just removed it
                if self._posix.same(fd, path):
                    return MachineHold(path, fd, exclusive)
                os.close(fd)

    def _home(self) -> str:
        home = os.path.join(tempfile.gettempdir(), f"asyncckpt-{os.getuid()}")
        with named("make", home):
            with contextlib.suppress(FileExistsError):
                os.mkdir(home, 0o700)
            found = os.lstat(home)
        if found.st_uid != os.getuid() or not self._posix.is_directory(home):
            raise StorageError(f"{home} is not a directory of this user's: remove it, or set TMPDIR")
        return home


def _let_go_in_child() -> None:
    for hold in list(_held):
        hold._forget()


os.register_at_fork(after_in_child=_let_go_in_child)
