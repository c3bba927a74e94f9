"""A directory on a file system.

Data is written with O_DIRECT where the file system takes it (the page cache is what costs the peers most), else
buffered, and dropped from the cache once it is durable. A failed fsync poisons its file: the whole attempt is given
up, and its bytes are written again under new names.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path

from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.format import names
from asyncckpt.storage.files import LocalHold, LocalReadable, LocalWritable, named, read_all, write_all
from asyncckpt.storage.posix import O_DIRECT, Posix
from asyncckpt.storage.spares import Spares

log = logging.getLogger("asyncckpt")
_FULL = {errno.ENOSPC, errno.EDQUOT}
_TRIES = 20
"""Times that a folder is made anew which somebody else removes."""


class LocalStorage:
    """Checkpoints below the directory `root`, which is made, with its parents, by the first `begin` or `publish`."""

    def __init__(self, root: str, posix: Posix | None = None, direct: bool = True) -> None:
        self.root = os.path.abspath(root)
        self.posix = posix or Posix()
        self.direct = direct and O_DIRECT != 0
        self._rooted = False
        self._spares: Spares | None = None

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
        with named("list", path):
            if self._link_in(prefix):
                return []
            try:
                return self.posix.listdir(path)
            except (FileNotFoundError, NotADirectoryError):
                return []

    def read(self, key: str, limit: int) -> bytes:
        path = self.path(key)
        with named("read", path):
            self._refuse_links(key)
        with named("read", path), self.posix.opened(path) as fd:
            size = self.posix.size(fd)
            if size > limit:
                raise CorruptCheckpointError(f"{path}: {size} bytes where at most {limit} can be right")
            buffer = bytearray(size)
            done = read_all(self.posix, fd, memoryview(buffer), 0)
        if done != size:
            raise CorruptCheckpointError(f"{path}: shorter than its size of {size} bytes")
        return bytes(buffer)

    def open(self, key: str, *, cached: bool = True) -> LocalReadable:
        path = self.path(key)
        with named("open", path):
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

    def begin(self, folder: str, *, shared: bool = False) -> None:
        step, _, _ = folder.partition("/")
        self.make_root()
        with named("make", self.path(folder)):
            if shared:
                self._make_shared(self.path(step), self.path(folder))
            else:
                self._make_folder(self.path(step))
                self.posix.mkdir(self.path(folder))

    def _make_shared(self, step: str, folder: str) -> None:
        """Of several ranks: rank 0 may clear the step's folder, and remove it, until this is in it."""
        for left in reversed(range(_TRIES)):
            self._make_folder(step)
            try:
                self._make_folder(folder)
                return
            except FileNotFoundError:
                if not left:
                    raise

    def _make_folder(self, path: str) -> None:
        if self.posix.is_directory(path):
            return
        try:
            self.posix.mkdir(path)
        except FileExistsError:
            if not self.posix.is_directory(path):  # another rank may have made it meanwhile
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
            with named("make", path):
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
            with named(f"fsync {path}, on the way to", self.root):
                try:
                    self.posix.fsync_dir(path)
                except PermissionError:
                    if path in changed:
                        raise

    def create(self, key: str, size: int, *, steady: bool = False) -> LocalWritable:
        path = self.path(key)
        with named("create", path):
            self._refuse_links(key)
            spare = self._spares.take(path, size) if self._spares is not None and steady else None
            if spare is not None:
                return self._reserved(LocalWritable(self.posix, path, spare, size, True), spare, size)
            try:
                fd, direct = self.posix.create(path, self.direct), self.direct
            except OSError as error:
                if not self.direct or error.errno != errno.EINVAL:
                    raise
                self._refused(path)
                fd, direct = self.posix.create(path, False), False
        return self._reserved(LocalWritable(self.posix, path, fd, size, direct), fd, size)

    def _reserved(self, file: LocalWritable, fd: int, size: int) -> LocalWritable:
        try:
            with named("reserve blocks for", file.path):
                try:
                    if size:
                        self.posix.reserve(fd, size)
                except OSError as error:
                    if error.errno not in _FULL or self._spares is None or not self._spares.drop():
                        raise
                    self.posix.reserve(fd, size)
        except BaseException:
            file.abort()
            raise
        return file

    # Writing over what is retired

    def start_recycling(self) -> None:
        """From now on, `create` may write over what `recycle` has set aside. Only the owner of the run may do so.

        Not where files are written through the page cache: there it gains nothing.
        """
        if self.direct:
            self._spares = Spares(self.posix, self.root)

    def drop_recycled(self) -> None:
        """Remove what is set aside: files of the kind that `create` writes over will not be made for a while."""
        if self._spares is not None:
            self._spares.drop()

    def end_recycling(self) -> None:
        """Remove what is set aside, and set nothing aside any more."""
        self.drop_recycled()
        self._spares = None

    def recycle(self, folder: str) -> None:
        """Set images in `folder` aside: that of an attempt that was committed, and durably is of no checkpoint now."""
        if self._spares is None:
            return
        path = self.path(folder)
        with named("set aside", path):
            for name in self.list(folder):
                item = os.path.join(path, name)
                if names.is_image(name) and not self.posix.is_directory(item):
                    self._spares.keep(item)

    def share(self, source: str, key: str) -> None:
        path = self.path(key)
        with named("link", path):
            self._refuse_links(source)
            self._refuse_links(key)
            self.posix.link(self.path(source), path)

    def _refused(self, path: str) -> None:
        """Some file systems create the name before they refuse O_DIRECT."""
        try:
            self.posix.unlink(path)
        except FileNotFoundError:
            pass

    def put(self, key: str, data: bytes) -> None:
        path = self.path(key)
        with named("write", path):
            self._refuse_links(key)
            fd = self.posix.create(path, False)
            try:
                write_all(self.posix, fd, memoryview(data), 0)
                self.posix.fsync(fd)
            finally:
                self.posix.close(fd)

    def settle(self, folder: str) -> None:
        step, _, _ = folder.partition("/")
        for path in (self.path(folder), self.path(step), self.root):
            with named("fsync", path):
                self.posix.fsync_dir(path)

    def publish(self, key: str, data: bytes, *, replace: bool) -> None:
        parent, _, name = key.rpartition("/")
        if not parent:
            self.make_root()
        temporary = f"{parent}/{names.temporary(name)}" if parent else names.temporary(name)
        source, target = self.path(temporary), self.path(key)
        self.put(temporary, data)
        with named("publish", target):
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

    def update(self, key: str, limit: int, change: Callable[[bytes | None], bytes]) -> None:
        try:
            before = self.read(key, limit)
        except FileNotFoundError:
            before = None
        self.publish(key, change(before), replace=True)

    # Deleting

    def delete(self, key: str) -> None:
        path = self.path(key)
        with named("delete", path):
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
        with named("remove", path):
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
        with named("lock", path):
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
        with named("stat", path):
            return self.posix.free_bytes(path)
