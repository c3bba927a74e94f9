"""The trainer's end of the service: start it, speak to it, hear it, and notice its death.

`ProcessWriter` runs `python -m asyncckpt.writer`, which outlives the trainer; `ThreadWriter` runs the same service
on a thread of the trainer. Both call `on_reply` and `on_death` from a thread of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Protocol

from asyncckpt.errors import StorageError
from asyncckpt.storage.posix import Posix
from asyncckpt.write import messages as m
from asyncckpt.write.service import Service
from asyncckpt.write.workers import Workers

THREADS = 4
"""Worker threads of the service: while some wait for the disk, another hashes. With two, a disk idles as they hash."""

OnReply = Callable[[m.Reply], None]
OnDeath = Callable[[str], None]
COMMAND = [sys.executable, "-P", "-m", "asyncckpt.writer"]


class ArenaMemory(Protocol):
    """What a writer must know of an arena."""

    id: int
    size: int
    fd: int | None
    memory: memoryview


class Writer(Protocol):
    @property
    def pid(self) -> int: ...

    def send(self, message: m.Request) -> None:
        """Returns at once; a message to a dead service is lost, and its death told by `on_death`."""

    def share(self, arena: ArenaMemory) -> None: ...

    def join(self, timeout: float | None) -> bool:
        """Wait until the service has ended; False after `timeout` seconds."""


class ProcessWriter:
    """The service in a process of its own session, which ignores INT, TERM and HUP.

    Raises:
        StorageError: the process can't be started, or not be watched.
    """

    def __init__(self, on_reply: OnReply, on_death: OnDeath) -> None:
        self._on_reply, self._on_death = on_reply, on_death
        self._lock = threading.Lock()
        with contextlib.ExitStack() as undo:
            try:
                self._start(undo)
            except (OSError, RuntimeError) as error:  # too many files; no memory for a process or thread
                number = error.errno if isinstance(error, OSError) else None
                raise StorageError(f"can't start the writer process: {error}", retryable=True, errno=number) from error
            undo.pop_all()

    def _start(self, undo: contextlib.ExitStack) -> None:
        """Start the process, and the thread that listens to it; what is to be undone if a later step fails is noted."""
        with contextlib.ExitStack() as theirs:
            self._socket, link = socket.socketpair()
            undo.callback(self._socket.close)
            theirs.callback(link.close)
            with contextlib.suppress(OSError):
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            arguments, fds = ["--socket", str(link.fileno())], [link.fileno()]
            trainer = _pidfd(os.getpid(), theirs)
            if trainer is not None:
                arguments += ["--trainer", str(trainer)]
                fds.append(trainer)
            self._process = subprocess.Popen(
                [*COMMAND, *arguments],
                pass_fds=fds,
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=_environment(),
            )
        undo.callback(self._process.wait)
        undo.callback(self._process.kill)
        child = _pidfd(self._process.pid, undo)
        self._listener = threading.Thread(target=self._listen, args=[child], name="asyncckpt-listen", daemon=True)
        self._listener.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: m.Request) -> None:
        with self._lock, contextlib.suppress(OSError):
            self._socket.sendall(m.frame(message))

    def share(self, arena: ArenaMemory) -> None:
        assert arena.fd is not None
        with self._lock, contextlib.suppress(OSError):
            socket.send_fds(self._socket, [m.frame(m.Share(arena.id, arena.size))], [arena.fd])

    def join(self, timeout: float | None) -> bool:
        self._listener.join(timeout)
        return not self._listener.is_alive()

    def _listen(self, child: int | None) -> None:
        deframer = m.Deframer(m.Reply)
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        if child is not None:
            poll.register(child, select.POLLIN)
        ended = False
        try:
            while not ended:
                ended = any(fd == child for fd, _ in poll.poll())
                while data := self._receive(ended):
                    for reply in deframer.feed(data):
                        self._on_reply(reply)
                    if not ended:
                        break
                else:
                    ended = True
        finally:
            if child is not None:
                os.close(child)
            self._socket.close()
            code = self._process.wait()
            self._on_death(f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}")

    def _receive(self, ended: bool) -> bytes:
        """What has arrived; nothing where the service is gone."""
        try:
            return self._socket.recv(1 << 16, socket.MSG_DONTWAIT if ended else 0)
        except (BlockingIOError, ConnectionResetError):
            return b""


class ThreadWriter:
    """The service on a thread of the trainer: for systems without memfd, and without the promise to outlive it."""

    def __init__(self, on_reply: OnReply, on_death: OnDeath, posix: Posix | None = None) -> None:
        self._on_reply, self._on_death, self._posix = on_reply, on_death, posix
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="asyncckpt-service", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            raise StorageError(f"can't start the writer thread: {error}", retryable=True) from error
        self._ready.wait()

    @property
    def pid(self) -> int:
        return os.getpid()

    def send(self, message: m.Request, memory: memoryview | None = None) -> None:
        if self._loop is None:
            return  # it never came to be: on_death has told
        with contextlib.suppress(RuntimeError):  # the loop is closed: on_death has told
            self._loop.call_soon_threadsafe(self._service.receive, message, memory)

    def share(self, arena: ArenaMemory) -> None:
        self.send(m.Share(arena.id, arena.size), arena.memory)

    def join(self, timeout: float | None) -> bool:
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        reason = "ended"
        try:
            with asyncio.Runner(loop_factory=new_event_loop) as runner:
                runner.run(self._serve())
        except BaseException as error:
            reason = f"failed: {type(error).__name__}: {error}"
        finally:
            self._ready.set()
            self._on_death(reason)

    async def _serve(self) -> None:
        self._service = Service(self._on_reply, workers=Workers(THREADS, nice=0), posix=self._posix)
        self._loop = asyncio.get_running_loop()
        self._ready.set()
        await self._service.finished()


def _pidfd(pid: int, closing: contextlib.ExitStack) -> int | None:
    """What tells the end of a process; `closing` closes it. None where the system has no such thing."""
    if not hasattr(os, "pidfd_open"):
        return None
    fd = os.pidfd_open(pid)
    closing.callback(os.close, fd)
    return fd


def new_event_loop() -> asyncio.AbstractEventLoop:
    """A uvloop where it is installed, else the stock loop."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


def _environment() -> dict[str, str]:
    """The trainer's, with the package importable where it was found beside a script and not installed."""
    environment = dict(os.environ)
    home = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    if os.path.basename(home) not in ("site-packages", "dist-packages"):
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [environment.get("PYTHONPATH"), home]))
    return environment
