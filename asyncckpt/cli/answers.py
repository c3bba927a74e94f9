"""What a command hands back, how it is printed, and the exit codes."""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ParamSpec

import typer

from asyncckpt.errors import (
    CheckpointError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    ConflictError,
    CorruptCheckpointError,
    StorageError,
)

OK, NO, USAGE, NOT_FOUND, CORRUPT, STORAGE, CONFLICT, OTHER, BUG = 0, 1, 2, 3, 4, 5, 6, 7, 70
EXIT_CODES = {
    OK: "done, and the answer is yes",
    NO: "the answer is no: diff found differences",
    USAGE: "the command can't be understood, or what it would write is there already",
    NOT_FOUND: "no such run, checkpoint, part or tensor",
    CORRUPT: "a checkpoint is damaged",
    STORAGE: "the storage failed or refused",
    CONFLICT: "a live writer owns the run; its pid is named",
    OTHER: "something else that can't be done; the message says what",
    BUG: "a bug of asyncckpt, with its traceback",
}
"""Beside them 130 (interrupted) and 141 (whoever read the output went away), as the shell has them."""

_CODE_OF: list[tuple[type[BaseException], int]] = [
    (CheckpointNotFoundError, NOT_FOUND),
    (CheckpointExistsError, USAGE),
    (CorruptCheckpointError, CORRUPT),
    (StorageError, STORAGE),
    (ConflictError, CONFLICT),
    (CheckpointError, OTHER),
]
P = ParamSpec("P")


class UsageError(Exception):
    """What was asked for makes no sense."""


@dataclass(frozen=True)
class Answer:
    """`data` is what `--json` prints, as one object; `lines` are for people."""

    data: dict[str, Any]
    lines: Iterable[str] = field(default=())
    code: int = OK
    exact: bool = False
    """Whether `lines` are for other programs too: then only a terminal gets them escaped."""


def parsed(option: str, parse: Callable[[str], float], text: str) -> float:
    """What `parse` makes of an option's text.

    Raises:
        UsageError: it can't be understood.
    """
    try:
        return parse(text)
    except ValueError as error:
        raise UsageError(f"{option} {text}: {error}") from None


def code_of(error: BaseException) -> int:
    return next((code for kind, code in _CODE_OF if isinstance(error, kind)), BUG)


def answering(command: Callable[P, Answer]) -> Callable[P, None]:
    """A typer command that prints what `command` answers, and ends with the exit code of it, or of its error."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        as_json = bool(kwargs.get("as_json"))
        try:
            code = _run(lambda: command(*args, **kwargs), as_json)
            sys.stdout.flush()
        except KeyboardInterrupt:
            code = 130
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter complains at its end
            code = 141
        raise typer.Exit(code)

    return run


def _run(command: Callable[[], Answer], as_json: bool) -> int:
    try:
        answer = command()
        _print(answer, as_json)
        return answer.code
    except UsageError as error:
        return _failed(error, USAGE, as_json)
    except CheckpointError as error:
        return _failed(error, code_of(error), as_json)
    except BrokenPipeError:
        raise
    except Exception as error:
        sys.stderr.write("".join(safe(line) + "\n" for line in traceback.format_exc().splitlines()))
        return _failed(error, BUG, as_json)


def _print(answer: Answer, as_json: bool) -> None:
    if as_json:
        print(to_json(answer.data))
        return
    escape = safe if not answer.exact or sys.stdout.isatty() else str
    for line in answer.lines:
        print(escape(line))


def _failed(error: Exception, code: int, as_json: bool) -> int:
    if as_json:
        print(to_json({"error": describe(error), "code": code}))
    notes = getattr(error, "__notes__", [])
    for text in (str(error), *notes):
        print(f"asyncckpt: {safe(text)}", file=sys.stderr)
    return code


def describe(error: Exception) -> dict[str, Any]:
    """An error for `--json`: its type, its message, and what it says of the place."""
    places = ("step", "part", "tensor", "chunk", "pid")
    known = {name: getattr(error, name) for name in places if getattr(error, name, None) is not None}
    return {"type": type(error).__name__, "message": str(error), **known}


def to_json(data: dict[str, Any]) -> str:
    """One line of ASCII: no name in it reaches a terminal raw."""
    return json.dumps(data, allow_nan=False).replace("\x7f", "\\u007f")


def safe(text: str) -> str:
    """`text` with everything escaped that is not printable: control characters, line ends, bidirectional overrides."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> Iterable[str]:
    """Aligned columns, those whose number is in `right` flush right; nothing is cut or folded: it can be grepped."""
    cells = [[safe(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    flush = set(right)
    for row in [head, *cells]:
        yield "  ".join(
            cell.rjust(width) if i in flush else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
