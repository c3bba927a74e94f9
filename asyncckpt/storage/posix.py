"""The verbs that local storage is made of: thin calls to the operating system, one method each.

Everything that must be durable goes through an object of this class, so that a recorder or a fault injector
only has to wrap these. Paths are absolute; errors are `OSError`.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import signal
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

O_DIRECT: int = getattr(os, "O_DIRECT", 0)
_libc = ctypes.CDLL(None, use_errno=True)
_CACHESTAT = 451
"""cachestat(fd, range, stat, flags): counts pages of a file that are in memory. The same number on every machine."""

_OF_ONE_MACHINE = {0xEF53, 0x58465342, 0x01021994}
"""Types of file systems that only one machine has mounted (linux/magic.h): ext4, XFS, tmpfs."""


class Posix:
    """The real verbs."""

    def mkdir(self, path: str) -> None:
        os.mkdir(path, 0o700)

    def create(self, path: str, direct: bool) -> int:
        """A new file, 0600, open for writing; it must not exist."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(path, flags | (O_DIRECT if direct else 0), 0o600)

    def reserve(self, fd: int, size: int) -> None:
        """Give the file its blocks ahead of the bytes, so that a full disk is met before any is written."""
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, size)
        else:
            os.ftruncate(fd, size)

    def pwrite(self, fd: int, data: memoryview | bytes, offset: int) -> int:
        return os.pwrite(fd, data, offset)

    def truncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def fsync(self, fd: int) -> None:
        if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: fsync alone stops at the drive's cache
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
        else:
            os.fsync(fd)

    def fsync_dir(self, path: str) -> None:
        """Return only when the names in `path` are durable.

        XFS that has shut down says yes to the fsync of a directory, though nothing reaches the disk any more, and no to
        opening one (seen on Linux 6.18): so the yes is believed only where the directory can be opened after it.
        """
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        fd = os.open(path, flags)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        with suppress(FileNotFoundError):
            os.close(os.open(path, flags))

    def close(self, fd: int) -> None:
        os.close(fd)

    def rename(self, source: str, target: str) -> None:
        """Put `source` in the place of `target`, atomically, whether `target` exists or not."""
        os.rename(source, target)

    def link(self, source: str, target: str) -> None:
        """A second name for `source`; `FileExistsError` where `target` exists."""
        os.link(source, target, follow_symlinks=False)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def rmdir(self, path: str) -> None:
        os.rmdir(path)

    def listdir(self, path: str) -> list[str]:
        return os.listdir(path)

    def reclaim(self, path: str) -> int:
        """An existing regular file, open to be written over around the page cache.

        `OSError` where it has a second name, where anybody, this process too, has it open or mapped, and where that
        can't be told. A write lease tells (fcntl(2), F_SETLEASE); it is given back at once, for nobody else knows the
        name. Only file systems of one machine are asked: others grant leases that mean no more than this one.
        """
        if not hasattr(fcntl, "F_SETLEASE"):
            raise OSError(errno.EOPNOTSUPP, "no leases here")
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | O_DIRECT)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
                raise OSError(errno.EMLINK, f"not a regular file with one name: {path}")
            about = (ctypes.c_long * 32)()  # struct statfs, whose first member is the type
            if _libc.fstatfs(fd, about) != 0 or about[0] not in _OF_ONE_MACHINE:
                raise OSError(errno.EOPNOTSUPP, f"not on ext4 or XFS: {path}")
            fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)  # else who opens it now ends this process by SIGIO
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def open(self, path: str, direct: bool) -> int:
        """An existing regular file, open for reading; symlinks are refused."""
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        fd = os.open(path, flags | (O_DIRECT if direct else 0))
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(f"not a regular file: {path}")
        return fd

    def size(self, fd: int) -> int:
        return os.fstat(fd).st_size

    def preadv(self, fd: int, buffer: memoryview, offset: int) -> int:
        return os.preadv(fd, [buffer], offset)

    def cached(self, fd: int, offset: int, size: int) -> bool:
        """Whether the page cache holds all these bytes; False where that can't be told (Linux before 6.5, others).

        Asked of the kernel, for a read that may not block starts to read ahead.
        """
        span, pages = (ctypes.c_uint64 * 2)(offset, size), (ctypes.c_uint64 * 5)()
        if sys.platform != "linux" or _libc.syscall(_CACHESTAT, fd, span, pages, 0) != 0:
            return False
        first, end = offset // mmap.PAGESIZE, -(-(offset + size) // mmap.PAGESIZE)
        return int(pages[0]) >= end - first

    def is_directory(self, path: str) -> bool:
        """Whether `path` is a directory itself, not a link to one."""
        try:
            return stat.S_ISDIR(os.lstat(path).st_mode)
        except FileNotFoundError:
            return False

    def is_link(self, path: str) -> bool:
        return os.path.islink(path)

    def lock(self, path: str, exclusive: bool, wait: bool) -> int:
        """A directory, open and locked: shared, or `exclusive`. `BlockingIOError` where it is taken and not to `wait`.

        The kernel drops the lock with the descriptor, so with the process, however that ends.
        """
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
            fcntl.flock(fd, kind if wait else kind | fcntl.LOCK_NB)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def same(self, fd: int, path: str) -> bool:
        """Whether `fd` is what `path` names now."""
        try:
            return os.path.samestat(os.fstat(fd), os.stat(path))
        except FileNotFoundError:
            return False

    def free_bytes(self, path: str) -> int:
        info = os.statvfs(path)
        return info.f_bavail * info.f_frsize

    @contextmanager
    def opened(self, path: str, direct: bool = False) -> Iterator[int]:
        fd = self.open(path, direct)
        try:
            yield fd
        finally:
            self.close(fd)
