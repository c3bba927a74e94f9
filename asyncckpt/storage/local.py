"""A directory on a file system.

Data is written with O_DIRECT where the file system takes it (the page cache is what costs the peers most), else
buffered, and dropped from the cache once it is durable. A failed fsync poisons its file: the whole attempt is given
up, and its bytes are written again under new names.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from asyncckpt.errors import CorruptCheckpointError, StorageError
from asyncckpt.format import names
from asyncckpt.storage.posix import O_DIRECT, Posix

log = logging.getLogger("asyncckpt")
BLOCK = 4096
_TRANSIENT = {errno.EIO, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.ENOSPC, errno.EDQUOT, errno.EMFILE}


@contextmanager
def _named(what: str, path: str) -> Iterator[None]:
    """Turn an `OSError` into a `StorageError` that says what was tried where; what is absent stays as it is."""
    try:
        yield
    except (FileNotFoundError, FileExistsError, StorageError):
        raise
    except OSError as error:
        raise StorageError(
            f"can't {what} {path}: {error.strerror or error}", retryable=error.errno in _TRANSIENT, errno=error.errno
        ) from error


class LocalStorage:
    """Checkpoints below the directory `root`, which is made, with its parents, by the first `begin` or `publish`."""

    def __init__(self, root: str, posix: Posix | None = None, direct: bool = True) -> None:
        self.root = os.path.abspath(root)
        self.posix = posix or Posix()
        self.direct = direct and O_DIRECT != 0
        self._rooted = False

    @property
    def url(self) -> str:
        return self.root

    def path(self, key: str) -> str:
        return os.path.join(self.root, key) if key else self.root

    def _link_in(self, folder: str) -> bool:
        """Whether `folder` is, or lies below, a link, which may lead anywhere. The root itself may be one."""
        path = self.root
        for name in filter(None, folder.split("/")):
            path = os.path.join(path, name)
            if self.posix.is_link(path):
                return True
        return False

    def _refuse_links(self, key: str) -> None:
        if self._link_in(key.rpartition("/")[0]):
            raise OSError(errno.ELOOP, "a folder on the way is a symbolic link")

    # Reading

    def list(self, prefix: str) -> list[str]:
        path = self.path(prefix)
        with _named("list", path):
            if self._link_in(prefix):
                return []
            try:
                return self.posix.listdir(path)
            except (FileNotFoundError, NotADirectoryError):
                return []

    def read(self, key: str, limit: int) -> bytes:
        path = self.path(key)
        with _named("read", path):
            self._refuse_links(key)
        with _named("read", path), self.posix.opened(path) as fd:
            size = self.posix.size(fd)
            if size > limit:
                raise CorruptCheckpointError(f"{path}: {size} bytes where at most {limit} can be right")
            buffer = bytearray(size)
            done = _read(self.posix, fd, memoryview(buffer), 0)
        if done != size:
            raise CorruptCheckpointError(f"{path}: shorter than its size of {size} bytes")
        return bytes(buffer)

    def open(self, key: str, *, cached: bool = True) -> LocalReadable:
        path = self.path(key)
        with _named("open", path):
            self._refuse_links(key)
            fd = self.posix.open(path, False)
            try:
                direct = self._open_direct(path)
            except BaseException:
                self.posix.close(fd)
                raise
        return LocalReadable(self.posix, path, fd, direct, cached)

    def _open_direct(self, path: str) -> int | None:
        """None where the file system does not take O_DIRECT."""
        try:
            return self.posix.open(path, True) if self.direct else None
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return None

    # Writing

    def begin(self, folder: str) -> None:
        step, _, _ = folder.partition("/")
        self.make_root()
        with _named("make", self.path(folder)):
            if not self.posix.is_directory(self.path(step)):
                self._make_step(self.path(step))
            self.posix.mkdir(self.path(folder))

    def _make_step(self, path: str) -> None:
        try:
            self.posix.mkdir(path)
        except FileExistsError:
            raise OSError(errno.ENOTDIR, "something that is not a folder bears this name") from None

    def make_root(self) -> None:
        """Make the run's directory and the parents it lacks; all names on the way to it are durable on return.

        That takes an fsync of every directory above it, once: what is there may have been made a moment ago, by
        a process that was killed before it could fsync.
        """
        missing = []
        path = self.root
        while not self.posix.is_directory(path) and not os.path.isdir(path):
            missing.append(path)
            path = os.path.dirname(path)
        for path in reversed(missing):
            with _named("make", path):
                try:
                    self.posix.mkdir(path)
                except FileExistsError:
                    if not os.path.isdir(path):
                        raise
        if missing or not self._rooted:
            self._settle_above({os.path.dirname(path) for path in missing})
            self._rooted = True

    def _settle_above(self, changed: set[str]) -> None:
        """Fsync the directories above the root, up to the mount point; unchanged ones only where it is allowed."""
        device = os.stat(self.root).st_dev
        for path in map(str, Path(self.root).parents):
            if os.stat(path).st_dev != device:
                break
            with _named(f"fsync {path}, on the way to", self.root):
                try:
                    self.posix.fsync_dir(path)
                except PermissionError:
                    if path in changed:
                        raise

    def create(self, key: str, size: int) -> LocalWritable:
        path = self.path(key)
        with _named("create", path):
            self._refuse_links(key)
            try:
                fd, direct = self.posix.create(path, self.direct), self.direct
            except OSError as error:
                if not self.direct or error.errno != errno.EINVAL:
                    raise
                self._refused(path)
                fd, direct = self.posix.create(path, False), False
        file = LocalWritable(self.posix, path, fd, size, direct)
        try:
            with _named("reserve blocks for", path):
                if size:
                    self.posix.reserve(fd, size)
        except BaseException:
            file.abort()
            raise
        return file

    def _refused(self, path: str) -> None:
        """Some file systems create the name before they refuse O_DIRECT."""
        try:
            self.posix.unlink(path)
        except FileNotFoundError:
            pass

    def put(self, key: str, data: bytes) -> None:
        path = self.path(key)
        with _named("write", path):
            self._refuse_links(key)
            fd = self.posix.create(path, False)
            try:
                _write(self.posix, fd, memoryview(data), 0)
                self.posix.fsync(fd)
            finally:
                self.posix.close(fd)

    def settle(self, folder: str) -> None:
        step, _, _ = folder.partition("/")
        for path in (self.path(folder), self.path(step), self.root):
            with _named("fsync", path):
                self.posix.fsync_dir(path)

    def publish(self, key: str, data: bytes, *, replace: bool) -> None:
        parent, _, name = key.rpartition("/")
        if not parent:
            self.make_root()
        temporary = f"{parent}/{names.temporary(name)}" if parent else names.temporary(name)
        source, target = self.path(temporary), self.path(key)
        self.put(temporary, data)
        with _named("publish", target):
            if replace:
                self.posix.rename(source, target)
                self.posix.fsync_dir(self.path(parent))
                return
            try:
                self.posix.link(source, target)
            finally:
                self.posix.unlink(source)
            try:
                self.posix.fsync_dir(self.path(parent))
            except OSError:
                self.posix.unlink(target)  # it may not be durable, so it must not be seen either
                raise

    # Deleting

    def delete(self, key: str) -> None:
        path = self.path(key)
        with _named("delete", path):
            self._refuse_links(key)
            try:
                self.posix.unlink(path)
            except FileNotFoundError:
                pass  # gone, but maybe not durably
            try:
                self.posix.fsync_dir(os.path.dirname(path))
            except FileNotFoundError:
                pass

    def remove_folder(self, folder: str) -> None:
        path = self.path(folder)
        with _named("remove", path):
            for name in self.list(folder):
                item = os.path.join(path, name)
                ours = names.is_temporary(name) or ("/" in folder and names.is_data_file(name))
                if ours and not self.posix.is_directory(item):
                    self.posix.unlink(item)
            try:
                self.posix.rmdir(path)
            except FileNotFoundError:
                pass
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                log.info("%s is not ours, or holds files that are not; left alone", path)

    def hold(self, folder: str, *, exclusive: bool = False, wait: bool = True) -> LocalHold | None:
        path = self.path(folder)
        with _named("lock", path):
            self._refuse_links(f"{folder}/")
            while True:
                try:
                    held = LocalHold(self.posix, self.posix.lock(path, exclusive, wait))
                except BlockingIOError:
                    return None
                if self.posix.same(held.fd, path):
                    return held
                held.close()  # it was removed, and maybe made anew, while we waited

    def free_bytes(self) -> int | None:
        path = self.root
        while not os.path.isdir(path):
            path = os.path.dirname(path)
        with _named("stat", path):
            return self.posix.free_bytes(path)


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
        self._posix, self._path, self._fd, self._size = posix, path, fd, size
        self.direct = direct
        self._lock = threading.Lock()

    def write_at(self, offset: int, data: memoryview) -> None:
        with _named("write", self._path):
            direct = self.direct  # another thread may be giving it up meanwhile
            whole = len(data) // BLOCK * BLOCK if direct else len(data)
            try:
                _write(self._posix, self._fd, data[:whole], offset)
                if whole < len(data):
                    self._write_tail(offset + whole, data[whole:])
            except OSError as error:
                if not direct or error.errno != errno.EINVAL:
                    raise
                self._give_up_direct()
                _write(self._posix, self._fd, data, offset)

    def _write_tail(self, offset: int, tail: memoryview) -> None:
        block = mmap.mmap(-1, BLOCK)  # not closed by `with`: the frames of an exception may hold views of it
        block[: len(tail)] = tail
        _write(self._posix, self._fd, memoryview(block), offset)

    def _give_up_direct(self) -> None:
        """The file system took O_DIRECT at open and refuses it now: go on through the page cache."""
        with self._lock:
            flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags & ~O_DIRECT)
            self.direct = False

    def finish(self) -> None:
        try:
            with _named("make durable", self._path):
                self._posix.truncate(self._fd, self._size)
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
                log.warning("closing %s: %s", self._path, error)


class LocalReadable:
    """Opened twice: what the page cache holds is read through it by `fd`, the rest around it by `direct`."""

    def __init__(self, posix: Posix, path: str, fd: int, direct: int | None, cached: bool) -> None:
        self._posix, self._path = posix, path
        self._fd, self._direct, self._cached = fd, direct, cached
        try:
            with _named("stat", path):
                self._size = posix.size(fd)
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        return self._size

    def read_into(self, offset: int, buffer: memoryview) -> int:
        with _named("read", self._path):
            if self._direct is None or (self._cached and self._posix.cached(self._fd, offset, len(buffer))):
                return _read(self._posix, self._fd, buffer, offset)
            return self._read_direct(self._direct, offset, buffer)

    def _read_direct(self, fd: int, offset: int, buffer: memoryview) -> int:
        try:
            whole = len(buffer) // BLOCK * BLOCK
            done = _read(self._posix, fd, buffer[:whole], offset)
            if done == whole and whole < len(buffer):
                done += self._read_tail(fd, offset + whole, buffer[whole:])
            return done
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        return _read(self._posix, self._fd, buffer, offset)

    def _read_tail(self, fd: int, offset: int, tail: memoryview) -> int:
        block = mmap.mmap(-1, BLOCK)  # not closed by `with`: the frames of an exception may hold views of it
        done = min(_read(self._posix, fd, memoryview(block), offset), len(tail))
        tail[:done] = block[:done]
        return done

    def close(self) -> None:
        for fd in (self._fd, self._direct):
            try:
                if fd is not None:
                    self._posix.close(fd)
            except OSError as error:  # what was read was verified all the same
                log.warning("closing %s: %s", self._path, error)


def _write(posix: Posix, fd: int, data: memoryview, offset: int) -> None:
    while data:
        done = posix.pwrite(fd, data, offset)
        if done <= 0:
            raise OSError(errno.EIO, "the file system wrote nothing")
        data, offset = data[done:], offset + done


def _read(posix: Posix, fd: int, buffer: memoryview, offset: int) -> int:
    """Bytes read: all that `buffer` takes, or up to the end of the file."""
    total = 0
    while total < len(buffer):
        done = posix.preadv(fd, buffer[total:], offset + total)
        if done == 0:
            break
        total += done
    return total
