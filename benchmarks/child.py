"""Processes of the benchmark: every measurement is made in a fresh one, which tells what it found line by line.

The parent gives a child a role and options, and reads its records (JSON) from a pipe. Everything is bounded in time,
and whatever a child leaves behind is ended with it.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).resolve().parent.parent
Record = dict[str, Any]


class ChildError(Exception):
    """A child failed; the text is what it, or the library in it, said last."""


class Child:
    """A running `benchmarks.roles` process. Leaving the context ends it and all that it started."""

    def __init__(self, role: str, limit: float, *, wrap: tuple[str, ...] = (), **options: Any) -> None:
        self._deadline = time.monotonic() + limit
        self._limit, self._role = limit, role
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        read, write = os.pipe()
        command = [*wrap, sys.executable, "-m", "benchmarks.roles", str(write), role, json.dumps(options)]
        environment = {"TOKENIZERS_PARALLELISM": "false", **os.environ, "PYTHONPATH": str(ROOT)}
        try:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=self._errors,
                stderr=self._errors,
                pass_fds=(write,),
                start_new_session=True,
            )
        finally:
            os.close(write)
        self._pipe = os.fdopen(read, "rb", buffering=0)
        self._told: deque[bytes] = deque()
        self._rest = b""
        self._silent = False
        """Whether it, and all that it started, has closed its end of the pipe."""

    def say(self, **record: Any) -> None:
        """Give it one line (JSON) on its standard input."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(record).encode() + b"\n")
        self.process.stdin.flush()

    def listen(self, until: float) -> Iterator[Record]:
        """What it tells, as it comes, until `time.monotonic()` is `until`; what it has told by then is all given."""
        while True:
            while self._told:
                yield json.loads(self._told.popleft())
            left = max(0.0, until - time.monotonic())
            if self._silent or not select.select([self._pipe], [], [], left)[0]:
                return
            data = self._pipe.read(1 << 16)
            self._silent = not data
            *lines, self._rest = (self._rest + data).split(b"\n")
            self._told.extend(lines)

    def records(self) -> Iterator[Record]:
        """What it tells, as it comes, until it ends.

        Raises:
            ChildError: it failed, or its time is up.
        """
        yield from self.listen(self._deadline)
        if not self._silent:
            raise ChildError(f"not done after {self._limit:.0f} s")
        try:
            status = self.process.wait(timeout=max(1.0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise ChildError(f"not ended after {self._limit:.0f} s") from None
        if status != 0:
            raise ChildError(self.last_words())

    def last_words(self) -> str:
        """The last line it wrote that tells something."""
        self._errors.seek(0)
        text = self._errors.read().decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        telling = [line for line in lines if "Error" in line or "Exception" in line]
        return (telling or lines or [f"{self._role} ended with status {self.process.poll()}"])[-1][:300]

    def kill(self) -> None:
        """SIGKILL, to this process alone."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()
        self._pipe.close()
        self._errors.close()


def run(role: str, limit: float, on_record: Callable[[Record], None] | None = None, **options: Any) -> list[Record]:
    """All that a child in this role tells.

    Raises:
        ChildError: it failed, or its time was up.
    """
    found = []
    with Child(role, limit, **options) as child:
        for record in child.records():
            found.append(record)
            if on_record is not None:
                on_record(record)
    return found


class Reporter:
    """The child's end of the pipe."""

    def __init__(self, fd: int) -> None:
        os.set_inheritable(fd, False)
        self._fd = fd

    def __call__(self, **record: Any) -> None:
        os.write(self._fd, json.dumps(record).encode() + b"\n")
