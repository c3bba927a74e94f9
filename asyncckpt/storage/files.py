"""Open files and held folders of a local run: what `LocalStorage` gives out."""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from asyncckpt.errors import StorageError
from asyncckpt.storage.posix import O_DIRECT, Posix

log = logging.getLogger("asyncckpt")
BLOCK = 4096
_TRANSIENT = {errno.EIO, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.ENOSPC, errno.EDQUOT, errno.EMFILE}


@contextmanager
def named(what: str, path: str) -> Iterator[None]:
    """Turn an `OSError` into a `StorageError` that says what was tried where; what is absent stays as it is."""
    try:
        yield
    except (FileNotFoundError, FileExistsError, StorageError):
        raise
    except OSError as error:
        raise StorageError(
            f"can't {what} {path}: {error.strerror or error}", retryable=error.errno in _TRANSIENT, errno=error.errno
        ) from error


class LocalHold:
    """A folder's lock, let go of at the latest when nobody refers to it any more."""

    def __init__(self, posix: Posix, fd: int) -> None:
        self._posix, self.fd = posix, fd

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            try:
                self._posix.close(fd)
            except OSError as error:  # the descriptor, and the lock with it, is gone all the same
                log.warning("closing a lock: %s", error)

    def __enter__(self) -> LocalHold:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class LocalWritable:
    """A file being written: whole blocks straight from the caller's memory, the tail through a block of its own."""

    def __init__(self, posix: Posix, path: str, fd: int, size: int, direct: bool) -> None:
        self._posix, self.path, self._fd, self._size = posix, path, fd, size
        self.direct = direct
        self._lock = threading.Lock()

    def write_at(self, offset: int, data: memoryview) -> None:
        with named("write", self.path):
            direct = self.direct  # another thread may be giving it up meanwhile
            whole = len(data) // BLOCK * BLOCK if direct else len(data)
            try:
                write_all(self._posix, self._fd, data[:whole], offset)
                if whole < len(data):
                    self._write_tail(offset + whole, data[whole:])
            except OSError as error:
                if not direct or error.errno != errno.EINVAL:
                    raise
                self._give_up_direct()
                write_all(self._posix, self._fd, data, offset)

    def _write_tail(self, offset: int, tail: memoryview) -> None:
        block = mmap.mmap(-1, BLOCK)  # not closed by `with`: the frames of an exception may hold views of it
        block[: len(tail)] = tail
        write_all(self._posix, self._fd, memoryview(block), offset)

    def _give_up_direct(self) -> None:
        """The file system took O_DIRECT at open and refuses it now: go on through the page cache."""
        with self._lock:
            flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags & ~O_DIRECT)
            self.direct = False

    def finish(self, size: int | None = None) -> None:
        try:
            with named("make durable", self.path):
                self._posix.truncate(self._fd, self._size if size is None else size)
                self._posix.fsync(self._fd)
                if not self.direct and hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            self.abort()

    def abort(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            try:
                self._posix.close(fd)
            except OSError as error:
                log.warning("closing %s: %s", self.path, error)


class LocalReadable:
    """Opened twice: what the page cache holds is read through it by `fd`, the rest around it by `direct`."""

    def __init__(self, posix: Posix, path: str, fd: int, direct: int | None, cached: bool) -> None:
        self._posix, self._path = posix, path
        self._fd, self._direct, self._cached = fd, direct, cached
        try:
            with named("stat", path):
                self._size = posix.size(fd)
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        return self._size

    def read_into(self, offset: int, buffer: memoryview) -> int:
        with named("read", self._path):
            if self._direct is None or (self._cached and self._posix.cached(self._fd, offset, len(buffer))):
                return read_all(self._posix, self._fd, buffer, offset)
            return self._read_direct(self._direct, offset, buffer)

    def _read_direct(self, fd: int, offset: int, buffer: memoryview) -> int:
        try:
            whole = len(buffer) // BLOCK * BLOCK
            done = read_all(self._posix, fd, buffer[:whole], offset)
            if done == whole and whole < len(buffer):
                done += self._read_tail(fd, offset + whole, buffer[whole:])
            return done
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        return read_all(self._posix, self._fd, buffer, offset)

    def _read_tail(self, fd: int, offset: int, tail: memoryview) -> int:
        block = mmap.mmap(-1, BLOCK)  # not closed by `with`: the frames of an exception may hold views of it
        done = min(read_all(self._posix, fd, memoryview(block), offset), len(tail))
        tail[:done] = block[:done]
        return done

    def close(self) -> None:
        for fd in (self._fd, self._direct):
            try:
                if fd is not None:
                    self._posix.close(fd)
            except OSError as error:  # what was read was verified all the same
                log.warning("closing %s: %s", self._path, error)


def write_all(posix: Posix, fd: int, data: memoryview, offset: int) -> None:
    while data:
        done = posix.pwrite(fd, data, offset)
        if done <= 0:
            raise OSError(errno.EIO, "the file system wrote nothing")
        data, offset = data[done:], offset + done


def read_all(posix: Posix, fd: int, buffer: memoryview, offset: int) -> int:
    """Bytes read: all that `buffer` takes, or up to the end of the file."""
    total = 0
    while total < len(buffer):
        done = posix.preadv(fd, buffer[total:], offset + total)
        if done == 0:
            break
        total += done
    return total
