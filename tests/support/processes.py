"""Real processes under test: trainers, and writers held at a chosen point. Every wait is bounded."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from asyncckpt.write import client

HELD_WRITER = str(Path(__file__).with_name("held_writer.py"))
PATIENCE = 30.0


class Hold:
    """A point at which the next writer process stands still: the n-th call of a storage verb, after one of another."""

    def __init__(self, folder: Path, verb: str, at: int = 1, after: str | None = None) -> None:
        folder.mkdir()
        self.command = [sys.executable, "-P", HELD_WRITER, after or verb, verb, str(at), str(folder)]
        self._fds = {}
        for name in ("reached", "go"):
            os.mkfifo(folder / name)
            self._fds[name] = os.open(folder / name, os.O_RDWR)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> Hold:
        """Let writers that this process starts from now on be held; those after the first go through."""
        monkeypatch.setattr(client, "COMMAND", self.command)
        return self

    def wait_reached(self) -> None:
        assert select.select([self._fds["reached"]], [], [], PATIENCE)[0], "the writer never came to the point"
        os.read(self._fds["reached"], 1)

    def release(self) -> None:
        os.write(self._fds["go"], b"." * 100)


class Trainer:
    """`source`, run by a Python of its own in its own session; its arguments follow. It speaks by lines on stdout."""

    def __init__(self, source: str, *arguments: object) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        self.process = subprocess.Popen(
            [sys.executable, "-c", source, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def read_line(self) -> str:
        """The next line it prints."""
        assert self.process.stdout is not None
        line = b""
        while not line.endswith(b"\n"):
            assert select.select([self.process.stdout], [], [], PATIENCE)[0], "the trainer said nothing"
            byte = os.read(self.process.stdout.fileno(), 1)
            if not byte:
                raise AssertionError(f"the trainer ended: {self.end()}")
            line += byte
        return line.decode().strip()

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    def end(self) -> tuple[int, str]:
        """Wait for its end: exit code and stderr. (Its writer, which may live on, shares its stderr: hence a file.)"""
        try:
            code = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError("the trainer does not end") from None
        self._errors.seek(0)
        return code, self._errors.read().decode()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self._errors):
            assert stream is not None
            stream.close()


def wait_for_end(pid: int) -> None:
    """Wait until the process, a child or not, is gone."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([fd], [], [], PATIENCE)[0], f"process {pid} does not end"
    finally:
        os.close(fd)


def until(condition: Callable[[], object]) -> None:
    """Wait for something another thread does."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)
