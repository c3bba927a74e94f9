"""A progress bar for whoever waits at a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE = 1.0
"""Seconds of waiting before a bar is shown."""


@contextmanager
def bar(total: Callable[[], tuple[int, int]], text: str = "writing checkpoints") -> Iterator[Callable[[], None]]:
    """Gives a function to call now and then; from the first call after `PATIENCE` seconds on it draws a bar.

    `total` says (bytes done, bytes in all). Nothing is drawn where stderr is not a terminal.
    """
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    task = progress.add_task(text, total=None)
    begun = time.monotonic()
    shown = False

    def update() -> None:
        nonlocal shown
        if not shown and time.monotonic() - begun >= PATIENCE:
            shown = True
            progress.start()
        if shown:
            done, whole = total()
            progress.update(task, completed=done, total=whole)

    try:
        yield update
    finally:
        if shown:
            progress.stop()
