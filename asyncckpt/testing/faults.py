"""Faults on purpose: at the n-th call of a verb."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from asyncckpt.storage.posix import Posix
from asyncckpt.testing.wrapping import CHANGES, PosixWrapper

ANY = "any"
"""Stands for every verb of `CHANGES`, counted together."""
When = Literal["before", "during", "after"]
PATIENCE = 60.0


class Gate(Protocol):
    def stand(self) -> None:
        """Called at the point that is held; returns when it may go on."""


class Hold:
    """A point at which a thread of this process stands still until it is let go."""

    def __init__(self, patience: float = PATIENCE) -> None:
        self._patience = patience
        self._reached, self._go = threading.Event(), threading.Event()

    def stand(self) -> None:
        self._reached.set()
        self._go.wait(self._patience)

    def wait_reached(self) -> bool:
        """Wait until somebody stands there; False where nobody came in time."""
        return self._reached.wait(self._patience)

    def release(self) -> None:
        self._go.set()


class FifoHold:
    """The same for another process: `folder` gets two fifos, and whoever opens the same folder may wait or let go."""

    def __init__(self, folder: str | os.PathLike[str], patience: float = PATIENCE) -> None:
        self._patience = patience
        self._fds = {}
        for name in ("reached", "go"):
            path = Path(folder) / name
            if not path.exists():
                os.mkfifo(path)
            self._fds[name] = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def stand(self) -> None:
        os.write(self._fds["reached"], b".")
        self._wait("go")

    def wait_reached(self) -> bool:
        """Wait until somebody stands there; False where nobody came in time."""
        return self._wait("reached")

    def release(self) -> None:
        os.write(self._fds["go"], b".")

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def _wait(self, name: str) -> bool:
        if not select.select([self._fds[name]], [], [], self._patience)[0]:
            return False
        os.read(self._fds[name], 1)
        return True


@dataclass(frozen=True)
class _Fault:
    verb: str
    at: int | None
    act: Callable[[str, tuple[Any, ...], Callable[..., Any]], Any]
    lasting: bool = False

    def hits(self, verb: str, number: int, changes: int) -> bool:
        if self.verb == ANY:
            verb, number = ANY if verb in CHANGES else verb, changes
        if self.verb != verb:
            return False
        return self.at is None or number == self.at or (self.lasting and number > self.at)


class FaultyPosix(PosixWrapper):
    """Performs the verbs until a fault's turn comes. Calls are counted from 1; `at=None` means every call.

    The methods that plan a fault return the object itself: `FaultyPosix().fail("fsync", 2, errno.EIO)`.
    """

    def __init__(self, inner: Posix | None = None) -> None:
        super().__init__(inner)
        self.counts: Counter[str] = Counter()
        """Calls so far, by verb, and under `ANY` those of all that change a disk."""
        self.fired = 0
        """How many faults have happened."""
        self._faults: list[_Fault] = []
        self._lock = threading.Lock()

    def fail(self, verb: str, at: int | None, error: int, *, after: bool = False, lasting: bool = False) -> Self:
        """Raise `OSError(error)`: instead of doing it, or `after` it is done (its answer was lost).

        With `lasting` all later calls fail too, until `heal`.
        A `close` that fails has closed all the same, as the kernel has it.
        """

        def act(verb: str, arguments: tuple[Any, ...], call: Callable[..., Any]) -> Any:
            if after or verb == "close":
                call(*arguments)
            raise OSError(error, os.strerror(error))

        return self._plan(verb, at, act, lasting)

    def shorten(self, at: int | None, verb: str = "pwrite") -> Self:
        """Take only half of the bytes of a `pwrite` (or `preadv`), whole sectors of them if it can be."""

        def act(verb: str, arguments: tuple[Any, ...], call: Callable[..., Any]) -> Any:
            fd, data, offset = arguments
            return call(fd, data[: _half(len(data))], offset)

        return self._plan(verb, at, act)

    def kill(self, at: int, when: When = "before", verb: str = ANY) -> Self:
        """SIGKILL this process before or after the operation, or in the middle of it (of a `pwrite`: half written)."""

        def act(verb: str, arguments: tuple[Any, ...], call: Callable[..., Any]) -> Any:
            if when == "after":
                call(*arguments)
            elif when == "during" and verb == "pwrite":
                fd, data, offset = arguments
                call(fd, data[: _half(len(data))], offset)
            os.kill(os.getpid(), signal.SIGKILL)
            return None

        return self._plan(verb, at, act)

    def delay(self, verb: str, at: int | None, seconds: float) -> Self:
        """Take so many seconds longer."""

        def act(verb: str, arguments: tuple[Any, ...], call: Callable[..., Any]) -> Any:
            time.sleep(seconds)
            return call(*arguments)

        return self._plan(verb, at, act)

    def hold(self, verb: str, at: int | None, gate: Gate) -> Self:
        """Stand still until `gate` opens, as on storage that hangs."""

        def act(verb: str, arguments: tuple[Any, ...], call: Callable[..., Any]) -> Any:
            gate.stand()
            return call(*arguments)

        return self._plan(verb, at, act)

    def heal(self) -> None:
        """Forget all faults and counts."""
        with self._lock:
            self._faults.clear()
            self.counts.clear()

    def around(self, verb: str, arguments: tuple[Any, ...], call: Callable[..., Any]) -> Any:
        with self._lock:
            self.counts[verb] += 1
            if verb in CHANGES:
                self.counts[ANY] += 1
            hit = next((f for f in self._faults if f.hits(verb, self.counts[verb], self.counts[ANY])), None)
            if hit is not None:
                self.fired += 1
        return call(*arguments) if hit is None else hit.act(verb, arguments, call)

    def _plan(self, verb: str, at: int | None, act: Callable[..., Any], lasting: bool = False) -> Self:
        with self._lock:
            self._faults.append(_Fault(verb, at, act, lasting))
        return self


def _half(size: int) -> int:
    half = size // 2
    return half // 512 * 512 or half or size
