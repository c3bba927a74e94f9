"""`asyncckpt verify`."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

from asyncckpt import progress
from asyncckpt.catalog.catalog import Catalog
from asyncckpt.cli import places
from asyncckpt.cli.answers import CORRUPT, OK, Answer, UsageError, describe
from asyncckpt.cli.units import show_seconds, show_size
from asyncckpt.errors import CheckpointNotFoundError, CorruptCheckpointError
from asyncckpt.read.reader import CheckpointReader


def verify(reference: str, every: bool) -> Answer:
    """Read and check all bytes of a checkpoint, or of `every` one of a run."""
    if every:
        location, step = places.split(reference)
        if step is not None:
            raise UsageError(f"{reference} is one checkpoint; --all takes a run")
        run = places.run_of(location)
        results = [result for step in run.committed() if (result := check(run, step)) is not None]
    else:
        run, step = places.checkpoint_of(reference)
        results = [check(run, step, must_exist=True) or {}]
    damaged = any(not result["ok"] for result in results)
    return Answer({"run": run.storage.url, "checkpoints": results}, _lines(results), CORRUPT if damaged else OK)


def check(run: Catalog, step: int, must_exist: bool = False) -> dict[str, Any] | None:
    """How the verification of `step` ended; None where it went while we were looking.

    Raises:
        CheckpointNotFoundError: it is not there, and `must_exist`.
    """
    begun = time.monotonic()
    result: dict[str, Any] = {"step": step, "ok": True}
    try:
        with CheckpointReader(run, step) as reader:
            result["bytes"] = read_all(reader)
    except CorruptCheckpointError as error:
        result |= {"ok": False, "error": describe(error)}
    except CheckpointNotFoundError:
        if must_exist or run.exists(step):
            raise
        return None
    return result | {"seconds": round(time.monotonic() - begun, 3)}


def read_all(reader: CheckpointReader) -> int:
    """Read and check all bytes, with a progress bar at a terminal; returns how many there are.

    Raises:
        CorruptCheckpointError: a byte is not what was committed.
    """
    size = reader.manifest.size
    done, lock = 0, threading.Lock()
    with progress.bar(lambda: (done, size), f"reading step {reader.step}") as update:

        def read(count: int) -> None:
            nonlocal done
            with lock:
                done += count
                update()

        reader.verify(read)
    return size


def _lines(results: list[dict[str, Any]]) -> Iterator[str]:
    for result in results:
        if result["ok"]:
            yield f"step {result['step']}: whole, {show_size(result['bytes'])} in {show_seconds(result['seconds'])}"
        else:
            yield f"step {result['step']}: DAMAGED: {result['error']['message']}"
    if not results:
        yield "no checkpoints"
