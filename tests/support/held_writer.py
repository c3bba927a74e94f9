"""A real writer process that stands still at one call of a storage verb until it is let go.

Run in place of `python -m asyncckpt.writer`, with AFTER VERB N FOLDER before its arguments: the n-th call of VERB
counted from the first call of AFTER on. FOLDER holds two fifos.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

from asyncckpt import writer
from asyncckpt.storage.posix import Posix


def held(after: str, verb: str, at: int, folder: str) -> Posix:
    counting = after == verb
    calls = itertools.count(1)

    def begin_counting(self: Posix, *arguments: Any) -> Any:
        nonlocal counting
        counting = True
        return getattr(Posix, after)(self, *arguments)

    def stop_here(self: Posix, *arguments: Any) -> Any:
        if counting and next(calls) == at:
            with open(f"{folder}/reached", "wb", buffering=0) as reached:
                reached.write(b".")
            with open(f"{folder}/go", "rb", buffering=0) as go:
                go.read(1)
        return getattr(Posix, verb)(self, *arguments)

    return type("HeldPosix", (Posix,), {after: begin_counting, verb: stop_here})()


if __name__ == "__main__":
    after, verb, at, folder, *arguments = sys.argv[1:]
    writer.main(arguments, held(after, verb, int(at), folder))
