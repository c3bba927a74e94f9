"""What must hold of every checkpoint, however it was made."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

import asyncckpt
from hostile.forge import STEP, live

_FORBIDDEN = ("import", "exec", "compile", "pickle.find_class", "marshal.loads", "os.system", "os.exec", "os.fork",
              "subprocess.Popen", "socket.", "ctypes.", "code.__new__", "shutil.", "os.remove", "os.rename",
              "os.mkdir", "os.rmdir", "os.chmod", "os.symlink", "os.link", "os.truncate")  # fmt: skip


class Watch:
    """An audit hook, which can't be taken off again: one for the process, told what to watch by `inside`."""

    _only: Watch | None = None

    def __init__(self) -> None:
        self.root: str | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._event)

    @classmethod
    def get(cls) -> Watch:
        cls._only = cls._only or cls()
        return cls._only

    def _event(self, event: str, args: tuple[Any, ...]) -> None:
        root = self.root
        if root is None:
            return
        if event in ("open", "os.listdir", "os.scandir") and isinstance(args[0], str):
            if args[0] != root and not args[0].startswith(root + "/"):
                self.seen.append(f"opened {args[0]}")
        elif event.startswith(_FORBIDDEN):
            self.seen.append(f"{event} {str(args)[:200]}")


def fingerprint(value: Any) -> Any:
    """Everything of a live state that a restore could touch, by value."""
    if isinstance(value, torch.Tensor):
        if value.numel() > 1 << 20:  # an expanded one, which would take memory that it does not have
            return tuple(value.shape), value.stride()
        return bytes(value.detach().contiguous().reshape(-1).view(torch.uint8).tolist()) if value.numel() else b""
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if hasattr(value, "state_dict"):
        return fingerprint(value.state_dict())
    if isinstance(value, dict):
        return [(str(key), fingerprint(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [fingerprint(item) for item in value]
    return repr(value)


def _tried(call: Any) -> str:
    """How a call ended: "ok", or the name of the error of ours. Any other error passes through, and is a bug."""
    try:
        call()
    except asyncckpt.CheckpointError as error:
        str(error)
        return type(error).__name__
    return "ok"


def judge(root: Path, watched: bool = True) -> list[str]:
    """Open, verify, load and restore what lies at `root`; how each ended.

    Raises:
        AssertionError: a promise was broken: the live state touched by a restore that raised, something opened
            outside of `root`, code imported or run.
    """
    watch = Watch.get()
    generators = asyncckpt.RngState()
    drawn = generators.state_dict()
    state = live(1)
    run = asyncckpt.open(root)

    def restored(**options: Any) -> str:
        before = fingerprint(state)
        how = _tried(lambda: run.restore(state, STEP, **options))
        assert how == "ok" or fingerprint(state) == before, f"a restore that raised {how} touched the live state"
        return how

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        watch.seen.clear()
        watch.root = str(root) if watched else None
        try:
            ends = [
                _tried(lambda: run.verify(STEP)),
                _tried(lambda: run.load()),
                _tried(lambda: run.load(STEP, parts=["model"], keys=["0.weight"])),
                _tried(lambda: run.load(STEP, parts=["extra"], keys=["turned", "views.1", "array"])),
                restored(),
                restored(rename={"0.": "0."}),
                restored(strict=False, parts=["model", "rng"]),
                _tried(run.records),
            ]
        finally:
            watch.root = None
            generators.load_state_dict(drawn)
    assert not watch.seen, watch.seen
    return ends
