"""Worlds of real ranks, over gloo, each in a process of its own. Every wait is bounded."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

CHILD = str(Path(__file__).with_name("rank_child.py"))
PATIENCE = 60.0


class RankGone(Exception):
    """It does not answer any more."""


class RankFailed(Exception):
    """What a rank has raised."""


class Member:
    """One rank, seen from outside."""

    def __init__(self, link: socket.socket, pid: int) -> None:
        self.pid = pid
        self._link, self._answers, self._commands = link, link.makefile("r"), link.makefile("w")

    def ask(self, do: str, **options: Any) -> None:
        with contextlib.suppress(OSError):  # a dead one is told of by `answer`
            print(json.dumps({"do": do, **options}), file=self._commands, flush=True)

    def answer(self, patience: float = PATIENCE) -> Any:
        """Its answer to the oldest command.

        Raises:
            RankFailed: it has raised something.
            RankGone: it is dead.
            TimeoutError: it has not answered after `patience` seconds.
        """
        self._link.settimeout(patience)
        try:
            line = self._answers.readline()
        except ConnectionResetError:
            line = ""
        if not line:
            raise RankGone
        answer = json.loads(line)
        if "error" in answer:
            raise RankFailed(answer["error"])
        return answer["value"]

    def kill(self, number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def close(self) -> None:
        for part in (self._answers, self._commands, self._link):
            with contextlib.suppress(OSError):
                part.close()


class World:
    """Its ranks, in order."""

    def __init__(self, members: list[Member], store: Any) -> None:
        self.members, self._store = members, store

    def all(self, do: str, ranks: list[int] | None = None, **options: Any) -> list[Any]:
        """What all ranks (or these) answer to one command, given to all at once; an exception in its place."""
        asked = self.members if ranks is None else [self.members[rank] for rank in ranks]
        for member in asked:
            member.ask(do, **options)
        answers: list[Any] = []
        for member in asked:
            try:
                answers.append(member.answer())
            except (RankGone, RankFailed) as error:
                answers.append(error)
        return answers

    def well(self, do: str, **options: Any) -> list[Any]:
        """`all`, where no rank may fail."""
        answers = self.all(do, **options)
        assert not any(isinstance(answer, Exception) for answer in answers), answers
        return answers

    def close(self) -> None:
        for member in self.members:
            member.kill(signal.SIGCONT)
            member.kill()
            member.close()


class Nursery:
    """Where ranks come from: a process that has loaded torch, and forks them."""

    def __init__(self, folder: Path) -> None:
        self._address = str(folder / "ranks")
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(self._address)
        self._listening.listen(64)
        tests = Path(__file__).parents[1]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])}
        self._process = subprocess.Popen(
            [sys.executable, "-P", CHILD, self._address], stdin=subprocess.PIPE, text=True, env=environment
        )

    @contextlib.contextmanager
    def world(
        self,
        root: Path,
        size: int,
        layout: str = "ddp",
        *,
        seed: int = 0,
        per_rank: dict[int, dict[str, Any]] | None = None,
        **options: Any,
    ) -> Iterator[World]:
        """A world whose ranks may open the run in `root`; `options` are the Checkpointer's, `per_rank` those of some.

        `layout` is how their model lies: "plain", "ddp", "fsdp", "2d" (sharded by two dimensions), "hybrid" (sharded by
        one, alike by the other).
        """
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        defaults = {"rank_timeout": 20.0, "on_error": "warn", "overlap": False}
        assert self._process.stdin is not None
        for rank in range(size):
            chosen = {**defaults, **options, **(per_rank or {}).get(rank, {})}
            order = {"rank": rank, "world": size, "port": store.port, "root": str(root), "layout": layout, "seed": seed}
            print(json.dumps({**order, "options": chosen}), file=self._process.stdin, flush=True)
        world = World(self._gather(size), store)
        try:
            for member in world.members:
                assert member.answer() == "there"
            yield world
        finally:
            world.close()

    def _gather(self, size: int) -> list[Member]:
        found: dict[int, Member] = {}
        deadline = time.monotonic() + PATIENCE
        while len(found) < size:
            self._listening.settimeout(max(0.1, deadline - time.monotonic()))
            link, _ = self._listening.accept()
            link.settimeout(PATIENCE)
            hello = json.loads(_line(link))
            found[hello["rank"]] = Member(link, hello["pid"])
        return [found[rank] for rank in range(size)]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(PATIENCE)
        self._listening.close()


def _line(link: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        byte = link.recv(1)
        assert byte, "a rank ended before it said anything"
        line += byte
    return line
