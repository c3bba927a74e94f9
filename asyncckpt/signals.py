"""Signals, heard at once even while the main thread is inside a C call.

Python runs signal handlers on the main thread only, between two bytecodes: a handler may come half a minute late. The
interpreter also writes each signal's number, at once and in C, to the *wakeup fd*; a thread here reads it.

What was there before stays in use: handlers are chained, a wakeup fd is passed on what it would have got, and both
come back when the last listener has left. Only the main thread may change either. In a forked child they come back at
once: a signal to a DataLoader worker is none to the trainer, and must not travel through the pipe they share.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import threading
import time
from collections.abc import Iterable
from types import FrameType
from typing import Protocol

from asyncckpt.errors import CheckpointError

log = logging.getLogger("asyncckpt")
_ECHO = 1.0
"""Seconds within which the same signal again is the same one, passed on by scheduler and launcher both."""
_STOP = b"\0"


class Listener(Protocol):
    def note(self, number: int) -> None:
        """Signal `number` has come. On the main thread, anywhere in its code: must take no lock, nor wait."""

    def hear(self, number: int) -> None:
        """The same, once per signal, on a thread of this module. Before `note` or after it."""


def on_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def check(numbers: Iterable[int]) -> None:
    """See whether `listen` can be called with these signals, here and now.

    Raises:
        ValueError: this is not the main thread, or a signal has a handler that Python can't chain.
    """
    if not on_main_thread():
        raise ValueError("signal handlers can be installed on the main thread only: make this there, or use signals=()")
    for number in numbers:
        if signal.getsignal(number) is None:
            raise ValueError(
                f"{signal.Signals(number).name} has a handler that was not installed from Python, and can't be "
                "chained; leave it out of signals="
            )


def listen(listener: Listener, numbers: Iterable[int]) -> None:
    """Tell `listener` of these signals. See `check` for what is raised.

    Raises:
        CheckpointError: there are too many open files, or threads.
    """
    numbers = list(numbers)
    check(numbers)
    with _lock:
        _put_back()
        try:
            _wakeup.open()
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"can't listen for signals: {error}. Raise the limits of this process.") from error
        for number in numbers:
            known = _handlers.get(number)
            if known is not None and known.in_use():
                known.listeners = (*known.listeners, listener)
                continue
            handler = _handlers[number] = _Handler(number)
            handler.listeners = (listener,)
            if known is not None:  # somebody has put his own on top, and may chain that one
                handler.listeners, known.listeners = (*known.listeners, listener), ()
            signal.signal(number, handler)


def leave(listener: Listener) -> None:
    """Tell it no more. Off the main thread, handlers that nobody needs any more stay, and step aside when called."""
    with _lock:
        for handler in _handlers.values():
            handler.listeners = tuple(other for other in handler.listeners if other is not listener)
    settle()


def settle() -> None:
    """Put back what was there before where nobody listens. Only the main thread can; elsewhere this does nothing."""
    if on_main_thread():
        with _lock:
            _put_back()


def _put_back() -> None:
    for number, handler in list(_handlers.items()):
        if not handler.listeners:
            del _handlers[number]
            if handler.in_use():
                signal.signal(number, handler.before)
    if not _handlers:
        _wakeup.close()


class _Handler:
    """The handler of one signal."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.before = signal.getsignal(number)
        self.listeners: tuple[Listener, ...] = ()
        self._first: float | None = None

    def in_use(self) -> bool:
        """Whether nobody has put another handler in this one's place."""
        return signal.getsignal(self.number) is self

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """On the main thread."""
        if not self.listeners:
            self._step_aside(number, frame)
            return
        _wakeup.make_sure(number)
        for listener in self.listeners:
            listener.note(number)
        if callable(self.before) and not self._ends_by_default():
            self.before(number, frame)

    def _step_aside(self, number: int, frame: FrameType | None) -> None:
        """Do what would have been done without this handler."""
        if self.in_use():
            signal.signal(number, self.before)
            os.kill(os.getpid(), number)
        elif callable(self.before):  # somebody has chained this one
            self.before(number, frame)

    def arrived(self) -> None:
        """On the thread of this module. The first time is a notice; again, and no echo, is meant to end the process."""
        now = time.monotonic()
        if self._first is None:
            self._first = now
            for listener in self.listeners:
                listener.hear(self.number)
        elif now - self._first > _ECHO and self._ends_by_default() and self.in_use():
            log.warning("%s again: ending at once", signal.Signals(self.number).name)
            die_by(self.number)

    def _ends_by_default(self) -> bool:
        return self.before in (signal.SIG_DFL, signal.default_int_handler)


def die_by(number: int) -> None:
    """End this process as signal `number` does by default; any thread may, whatever the main thread is doing."""
    set_handler = ctypes.pythonapi.PyOS_setsig  # `signal.signal` may be called on the main thread only
    set_handler.argtypes, set_handler.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    set_handler(number, None)
    os.kill(os.getpid(), number)
    if os.getpid() == 1:  # the first process of a container is not killed by what it sends itself
        os._exit(128 + number)


class _Wakeup:
    """The wakeup fd: a pipe, and the thread that reads it."""

    def __init__(self) -> None:
        self._ends: tuple[int, int] | None = None
        self._before = -1
        self._passed_on: int | None = None
        """A duplicate of the wakeup fd that was there before, whose own number may be another file's by now."""

    def open(self) -> None:
        if self._ends is not None:
            return
        with contextlib.ExitStack() as undo:
            reading, writing = os.pipe()
            undo.callback(os.close, reading)
            undo.callback(os.close, writing)
            os.set_blocking(writing, False)
            before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
            undo.callback(signal.set_wakeup_fd, before)
            passed_on = os.dup(before) if before >= 0 else None
            if passed_on is not None:
                undo.callback(os.close, passed_on)
            threading.Thread(target=_read, args=(reading, passed_on), name="asyncckpt-signals", daemon=True).start()
            undo.pop_all()
        self._ends, self._before, self._passed_on = (reading, writing), before, passed_on

    def make_sure(self, number: int) -> None:
        """Signal `number` has come, on the main thread: if the wakeup fd is somebody else's by now, tell the thread."""
        if self._ends is None:
            return
        writing = self._ends[1]
        now = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        if now == writing:
            return
        if now >= 0:
            with contextlib.suppress(ValueError, OSError):  # closed meanwhile: then this one stays
                signal.set_wakeup_fd(now)
        with contextlib.suppress(BlockingIOError):
            os.write(writing, bytes([number]))

    def close(self) -> None:
        """Put the one before back; the thread ends, and closes its side, when it has read all."""
        if self._ends is None:
            return
        writing = self._ends[1]
        self._ends = None
        now = signal.set_wakeup_fd(-1)
        with contextlib.suppress(ValueError, OSError):  # the one before has been closed meanwhile
            if now != writing:
                signal.set_wakeup_fd(now)
            elif self._passed_on is not None and os.path.sameopenfile(self._before, self._passed_on):
                signal.set_wakeup_fd(self._before)
        os.set_blocking(writing, True)
        os.write(writing, _STOP)
        os.close(writing)

    def forget(self) -> None:
        """In a forked child: the thread is not there, and the pipe is the parent's."""
        if self._ends is None:
            return
        ends, self._ends = self._ends, None
        if signal.set_wakeup_fd(-1) == ends[1] and self._before >= 0:
            with contextlib.suppress(ValueError, OSError):
                signal.set_wakeup_fd(self._before)
        for fd in (*ends, self._passed_on):
            if fd is not None:
                os.close(fd)


def _read(reading: int, passed_on: int | None) -> None:
    try:
        while True:
            data = os.read(reading, 512)
            for number in data.rstrip(_STOP):
                handler = _handlers.get(number)
                if handler is not None:
                    try:
                        handler.arrived()
                    except Exception:  # the next signal must be heard all the same
                        log.exception("a notice could not be told")
            if passed_on is not None:
                with contextlib.suppress(OSError):  # full, or its reader is gone
                    os.write(passed_on, data.rstrip(_STOP))
            if data.endswith(_STOP):
                return
    finally:
        os.close(reading)
        if passed_on is not None:
            os.close(passed_on)


def _in_child() -> None:
    """A forked child has nobody who listens."""
    global _lock
    _lock = threading.Lock()
    for number, handler in _handlers.items():
        handler.listeners = ()
        if handler.in_use():
            signal.signal(number, handler.before)
    _handlers.clear()
    _wakeup.forget()


_lock = threading.Lock()
"""Held while the tables change; never in a handler."""
_handlers: dict[int, _Handler] = {}
_wakeup = _Wakeup()
os.register_at_fork(after_in_child=_in_child)
