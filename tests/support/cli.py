"""The command line, called in this process, and what it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from asyncckpt.format import names


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.out.count("\n") == 1, "one object, on one line"
        return json.loads(self.out)


Command = Callable[..., Result]


def manifest_of(run: Path, step: int) -> Path:
    return run / names.step_name(step) / names.MANIFEST


def image_of(run: Path, step: int) -> Path:
    return next(run.glob(f"{names.step_name(step)}/*/model.safetensors"))
