"""`asyncckpt export`."""

from __future__ import annotations

import threading
from pathlib import Path

from asyncckpt import progress
from asyncckpt.catalog.catalog import Catalog
from asyncckpt.cli import places
from asyncckpt.cli.answers import Answer, UsageError, safe
from asyncckpt.cli.units import show_size
from asyncckpt.errors import CheckpointNotFoundError, CorruptCheckpointError
from asyncckpt.read.export import DTYPES, Exported, export
from asyncckpt.read.reader import CheckpointReader


def write(reference: str, file: str, part: str, dtype: str | None, overwrite: bool) -> Answer:
    """Write a part of a checkpoint to one safetensors file; of a run, of the newest that has the part."""
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: give one of {', '.join(DTYPES)}")
    location, step = places.split(reference)
    run = places.run_of(location)
    step = _newest_with(run, part) if step is None else step
    with CheckpointReader(run, step) as reader:
        found = _written(reader, part, Path(file), dtype, overwrite)
    size = Path(file).stat().st_size
    data = {"run": run.storage.url, "step": step, "part": part, "file": file, "bytes": size, "tensors": len(found)}
    line = f"step {step}, part {part}: {len(found)} tensors, {show_size(size)} in {safe(file)}"
    return Answer(data | {"dtype": dtype}, [line])


def _newest_with(run: Catalog, part: str) -> int:
    """The newest checkpoint that has the part, or a newer one of which that can't be told: it will say why.

    Raises:
        CheckpointNotFoundError: none has it.
    """
    there: list[str] = []
    damaged: list[int] = []
    for step in run.candidates():
        try:
            parts = run.manifest(step).parts
        except CorruptCheckpointError:
            damaged.append(step)
            continue
        except CheckpointNotFoundError:
            continue  # retired meanwhile
        if part in parts:
            return damaged[0] if damaged else step
        there = there or parts
    raise CheckpointNotFoundError(
        f"no checkpoint in {run.storage.url} has a part {part!r}"
        + (f"; give --part: the newest has {', '.join(there)}" if there else "")
    )


def _written(reader: CheckpointReader, part: str, file: Path, dtype: str | None, overwrite: bool) -> list[Exported]:
    """The export, with a progress bar at a terminal."""
    size, done, lock = sum(share.size for share in reader.shares(part)), 0, threading.Lock()
    with progress.bar(lambda: (done, size), f"exporting step {reader.step}") as update:

        def read(count: int) -> None:
            nonlocal done
            with lock:
                done += count
                update()

        return export(reader, part, file, dtype, overwrite=overwrite, on_bytes=read)
