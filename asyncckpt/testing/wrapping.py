"""A `Posix` around another: every verb passes one method, which a recorder or a fault injector overrides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from asyncckpt.storage.posix import Posix

CHANGES = (
    "mkdir", "create", "reclaim", "reserve", "pwrite", "truncate", "fsync", "fsync_dir",
    "close", "rename", "link", "unlink", "rmdir",
)  # fmt: skip
"""The verbs that change a disk, or say when it has to be durable."""
LOOKS = ("listdir", "open", "size", "preadv", "cached", "is_directory", "lock", "free_bytes")
VERBS = CHANGES + LOOKS


class PosixWrapper(Posix):
    """Passes every verb on to `inner` (by default the real ones). Wrappers may be stacked in any order."""

    def __init__(self, inner: Posix | None = None) -> None:
        self.inner = inner or Posix()

    def around(self, verb: str, arguments: tuple[Any, ...], call: Callable[..., Any]) -> Any:
        """Do one verb: `call(*arguments)`. Override this."""
        return call(*arguments)

    def _pass(self, verb: str, *arguments: Any) -> Any:
        return self.around(verb, arguments, getattr(self.inner, verb))

    def mkdir(self, path: str) -> None:
        self._pass("mkdir", path)

    def create(self, path: str, direct: bool) -> int:
        fd: int = self._pass("create", path, direct)
        return fd

    def reclaim(self, path: str) -> int:
        fd: int = self._pass("reclaim", path)
        return fd

    def reserve(self, fd: int, size: int) -> None:
        self._pass("reserve", fd, size)

    def pwrite(self, fd: int, data: memoryview | bytes, offset: int) -> int:
        done: int = self._pass("pwrite", fd, data, offset)
        return done

    def truncate(self, fd: int, size: int) -> None:
        self._pass("truncate", fd, size)

    def fsync(self, fd: int) -> None:
        self._pass("fsync", fd)

    def fsync_dir(self, path: str) -> None:
        self._pass("fsync_dir", path)

    def close(self, fd: int) -> None:
        self._pass("close", fd)

    def rename(self, source: str, target: str) -> None:
        self._pass("rename", source, target)

    def link(self, source: str, target: str) -> None:
        self._pass("link", source, target)

    def unlink(self, path: str) -> None:
        self._pass("unlink", path)

    def rmdir(self, path: str) -> None:
        self._pass("rmdir", path)

    def listdir(self, path: str) -> list[str]:
        names: list[str] = self._pass("listdir", path)
        return names

    def open(self, path: str, direct: bool) -> int:
        fd: int = self._pass("open", path, direct)
        return fd

    def size(self, fd: int) -> int:
        size: int = self._pass("size", fd)
        return size

    def preadv(self, fd: int, buffer: memoryview, offset: int) -> int:
        done: int = self._pass("preadv", fd, buffer, offset)
        return done

    def cached(self, fd: int, offset: int, size: int) -> bool:
        answer: bool = self._pass("cached", fd, offset, size)
        return answer

    def is_directory(self, path: str) -> bool:
        answer: bool = self._pass("is_directory", path)
        return answer

    def lock(self, path: str, exclusive: bool, wait: bool) -> int:
        fd: int = self._pass("lock", path, exclusive, wait)
        return fd

    def free_bytes(self, path: str) -> int:
        free: int = self._pass("free_bytes", path)
        return free
