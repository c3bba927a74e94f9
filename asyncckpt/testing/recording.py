"""A recorder: the verbs are performed, and remembered in the order in which they were."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from asyncckpt.storage.posix import Posix
from asyncckpt.testing.wrapping import CHANGES, PosixWrapper


@dataclass(frozen=True, slots=True)
class Operation:
    """One verb that was called: its arguments, the bytes that it took, and how it ended.

    Paths and file descriptors stand as they were given: `crash` follows them to the files that they meant.
    """

    verb: str
    arguments: tuple[Any, ...]
    data: bytes = b""
    """Of a `pwrite`: the bytes that the file took, which may be fewer than it was given."""
    result: Any = None
    error: int | None = None
    """The errno of a call that failed."""


@dataclass(frozen=True, slots=True)
class Note:
    """What somebody remarked between two operations, such as that a save was reported committed."""

    what: Any


class RecordingPosix(PosixWrapper):
    """Performs every verb, and keeps those that change a disk in `log`, with the notes between them.

    One such verb is done at a time, so the order of the log is the order of what happened. With `looks` the other
    verbs are kept too. Wrapped around a `FaultyPosix` it records what the caller saw.
    """

    def __init__(self, inner: Posix | None = None, *, looks: bool = False) -> None:
        super().__init__(inner)
        self.log: list[Operation | Note] = []
        self._looks = looks
        self._lock = threading.Lock()

    def note(self, what: Any) -> None:
        with self._lock:
            self.log.append(Note(what))

    @property
    def operations(self) -> list[Operation]:
        return [entry for entry in self.log if isinstance(entry, Operation)]

    def around(self, verb: str, arguments: tuple[Any, ...], call: Callable[..., Any]) -> Any:
        if verb not in CHANGES:
            result = call(*arguments)
            if self._looks:
                with self._lock:
                    self.log.append(Operation(verb, _plain(arguments), result=result))
            return result
        with self._lock:
            try:
                result = call(*arguments)
            except OSError as error:
                self.log.append(Operation(verb, _plain(arguments), error=error.errno))
                raise
            data = bytes(arguments[1][:result]) if verb == "pwrite" else b""
            self.log.append(Operation(verb, _plain(arguments), data, result))
            return result


def fsynced_again(log: Iterable[Operation | Note]) -> list[str]:
    """Files, by the path that they were created under, that were fsynced after an fsync of them had failed.

    The kernel may have dropped the pages of such a file and marked them clean: a second fsync says nothing.
    """
    paths: dict[int, str] = {}
    failed: set[int] = set()
    again = []
    for entry in log:
        match entry:
            case Operation("create", (path, _), error=None):
                paths[entry.result] = path
                failed.discard(entry.result)
            case Operation("reclaim", (path,), error=None):
                paths[entry.result] = path
                failed.discard(entry.result)
            case Operation("fsync", (fd,)):
                if fd in failed:
                    again.append(paths.get(fd, f"file descriptor {fd}"))
                if entry.error is not None:
                    failed.add(fd)
            case Operation("close", (fd,)):
                failed.discard(fd)
    return again


def _plain(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments without their buffers: those belong to the caller and will change."""
    return tuple(None if isinstance(a, memoryview | bytes) else a for a in arguments)
