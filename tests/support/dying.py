"""A process that dies at a chosen operation, without one: what it was to do from then on is not done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from asyncckpt.testing import CHANGES, PosixWrapper


class Dead(BaseException):
    """The death; no handler of ours catches it."""


class DyingPosix(PosixWrapper):
    """Dies at the `at`-th change of the disk, before it: that change, and all later ones, do not happen.

    Locks and descriptors end with a process, so closing still works.
    """

    def __init__(self, at: int) -> None:
        super().__init__()
        self._left = at

    def around(self, verb: str, arguments: tuple[Any, ...], call: Callable[..., Any]) -> Any:
        if verb in CHANGES and verb != "close":
            self._left -= 1
            if self._left <= 0:
                raise Dead
        return call(*arguments)
