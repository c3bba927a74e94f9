"""Runs `main` of an example again and again, each run in a process of its own that kills itself, until one ends well.

    python interrupted.py EXAMPLE FOLDER KILLS

KILLS is JSON: for each training, by number, the steps at which its runs are killed, and for each the milliseconds from
the line that tells of the step to the SIGKILL. Processes are forked, so that torch is imported once; a kill takes the
whole process group, workers included, but for the writer, which has a session of its own. On stdout, for each
training: a line of JSON with the steps that its runs started from, and the digest it ended with.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import signal
import sys
import threading
import traceback
from pathlib import Path
from types import ModuleType

import torch

import asyncckpt

Kill = tuple[int, float]
PATIENCE = 60
"""Seconds that one run may take."""


class Tripwire(io.TextIOBase):
    """A stdout that hands on what is said, and brings SIGKILL to the process group after the line of a step."""

    def __init__(self, to: int, kill: Kill | None) -> None:
        self._to, self._kill = to, kill

    def write(self, text: str) -> int:
        os.write(self._to, text.encode())
        if self._kill is not None and re.match(rf"step {self._kill[0]}\b", text):
            delay, self._kill = self._kill[1] / 1000, None
            if delay:
                threading.Timer(delay, die).start()
            else:
                die()
        return len(text)


def die() -> None:
    os.killpg(0, signal.SIGKILL)


def run(example: ModuleType, folder: Path, kill: Kill | None) -> tuple[str, bool]:
    """What one run said, and whether it was killed. It ends with an error: so do we."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setsid()
            signal.alarm(PATIENCE)
            os.close(reading)
            sys.stdout = Tripwire(writing, kill)
            example.main(["--run", str(folder)])
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as said:
        text = said.read()
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"a run ended with {code}")
    return text, code != 0


def train(example: ModuleType, folder: Path, kills: list[Kill]) -> dict[str, object]:
    starts: list[int] = []
    pending: list[Kill | None] = [*kills, None]
    while True:
        text, killed = run(example, folder, pending.pop(0) if pending else None)
        starts += [int(found) for found in re.findall(r"^start (\d+)$", text, re.M)]
        if not killed:
            digest = re.search(r"^digest (\w+)$", text, re.M)
            return {"starts": starts, "digest": digest[1] if digest else None}


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("example", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["example"] = module
    spec.loader.exec_module(module)
    return module


def warm_up() -> None:
    """Import what torch and asyncckpt import when they are first used, so that no run has to."""
    torch.optim.SGD([torch.zeros(1)])
    _ = asyncckpt.Checkpointer, asyncckpt.RngState, asyncckpt.Keep


def main() -> None:
    example, folder = load(Path(sys.argv[1])), Path(sys.argv[2])
    warm_up()
    for number, kills in enumerate(json.loads(sys.argv[3])):
        print(json.dumps(train(example, folder / str(number), kills)), flush=True)


if __name__ == "__main__":
    main()
