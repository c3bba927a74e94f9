"""The threads that move bytes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
Task = tuple["Future[Any]", Callable[[], Any]]


class DaemonPool(Executor):
    """A fixed pool of daemon threads.

    The standard pool refuses work once the interpreter begins to exit, which is when the last saves are drained.
    """

    def __init__(self, count: int, name: str, nice: int = 0) -> None:
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        self._count = count
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, args=(nice,), name=f"{name}-{i}", daemon=True) for i in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        if self._closed:
            raise RuntimeError("the pool is shut down")  # nobody would ever run it
        future: Future[T] = Future()
        self._tasks.put((future, lambda: fn(*args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._closed = True
        for _ in range(self._count):
            self._tasks.put(None)

    def join(self) -> None:
        """Wait until all threads have ended, after `shutdown`."""
        for thread in self._threads:
            thread.join()

    def _run(self, nice: int) -> None:
        if nice and sys.platform == "linux":
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
        while (task := self._tasks.get()) is not None:
            future, call = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
            del task, future, call


class Workers:
    """Two pools for the same work: a niced one for when nobody waits, a normal one for when somebody does."""

    def __init__(self, count: int, nice: int, name: str = "asyncckpt-io") -> None:
        self.count, self.nice = count, nice
        self.hurry = False
        self.abandoned = False
        """The process is to end, though a call hangs: nobody waits for one any more."""
        self._normal = DaemonPool(count, name)
        self._niced = DaemonPool(count, f"{name}-nice", nice) if nice else self._normal

    async def run(self, fn: Callable[..., T], *args: Any) -> T:
        """`fn(*args)` on one of the threads.

        When cancelled it still returns only after the call has: nobody may close a file or give an arena back while
        a thread works on it.
        """
        pool = self._normal if self.hurry else self._niced
        future = asyncio.get_running_loop().run_in_executor(pool, fn, *args)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            while not (future.done() or self.abandoned):
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([future])
            if future.done() and not future.cancelled():
                future.exception()  # or asyncio tells it: who has cancelled has an error of his own to tell
            raise

    def close(self) -> None:
        self._normal.shutdown()
        if self._niced is not self._normal:
            self._niced.shutdown()

    def join(self) -> None:
        """Wait, on a thread, until all calls have returned, after `close`."""
        self._normal.join()
        self._niced.join()


def available_cores() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
