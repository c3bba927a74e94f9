"""`asyncckpt export`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from asyncckpt import progress
from asyncckpt.catalog.catalog import Catalog
from asyncckpt.cli import places
from asyncckpt.cli.answers import Answer, UsageError, safe
from asyncckpt.cli.units import show_size
from asyncckpt.errors import CheckpointNotFoundError, CorruptCheckpointError
from asyncckpt.read.export import DTYPES, export
from asyncckpt.read.reader import CheckpointReader
from asyncckpt.read.sharded import export_sharded

FORMATS = ("safetensors", "torch", "dcp")


@dataclass(frozen=True)
class Wanted:
    """What is to be written, and as what. `shard_size`: several files in a folder, of so many bytes of tensors."""

    part: str | None = None
    kind: str = "safetensors"
    dtype: str | None = None
    shard_size: int | None = None
    overwrite: bool = False


def write(reference: str, target: str, wanted: Wanted) -> Answer:
    """Write a checkpoint, or a part of it, in another format; of a run, of the newest that has the part."""
    _check(wanted)
    if wanted.kind == "safetensors":
        return _safetensors(reference, target, replace(wanted, part=wanted.part or "model"))
    run, step = places.checkpoint_of(reference) if wanted.part is None else _with_part(reference, wanted.part)
    from asyncckpt.integrations import outgoing  # it loads torch

    with CheckpointReader(run, step) as reader, _bar(reader, reader.parts) as read:
        parts = outgoing.export(
            reader, wanted.part, Path(target), wanted.kind, overwrite=wanted.overwrite, on_bytes=read
        )
    data = {"run": run.storage.url, "step": step, "parts": parts, "file": target, "format": wanted.kind}
    return Answer(data, [f"step {step}, {', '.join(parts)}: {wanted.kind} in {safe(target)}"])


def _check(wanted: Wanted) -> None:
    if wanted.kind not in FORMATS:
        raise UsageError(f"--format {wanted.kind}: give one of {', '.join(FORMATS)}")
    if wanted.dtype is not None and wanted.dtype not in DTYPES:
        raise UsageError(f"--dtype {wanted.dtype}: give one of {', '.join(DTYPES)}")
    if wanted.kind != "safetensors" and (wanted.dtype is not None or wanted.shard_size is not None):
        raise UsageError(f"--dtype and --max-shard-size are for safetensors, not for {wanted.kind}")
    if wanted.kind == "dcp" and wanted.overwrite:
        raise UsageError("--overwrite replaces files, and no directories: remove the directory first")


def _safetensors(reference: str, target: str, wanted: Wanted) -> Answer:
    part = str(wanted.part)
    run, step = _with_part(reference, part)
    with CheckpointReader(run, step) as reader, _bar(reader, [part]) as read:
        if wanted.shard_size is None:
            found = export(reader, part, Path(target), wanted.dtype, overwrite=wanted.overwrite, on_bytes=read)
            files, tensors, size = 1, len(found), Path(target).stat().st_size
        else:
            size, dtype, overwrite = wanted.shard_size, wanted.dtype, wanted.overwrite
            sharded = export_sharded(reader, part, Path(target), size, dtype, overwrite=overwrite, on_bytes=read)
            files, tensors, size = len(sharded.files), sharded.tensors, sharded.size
    data = {"run": run.storage.url, "step": step, "part": part, "file": target, "bytes": size, "tensors": tensors}
    where = safe(target) if wanted.shard_size is None else f"{files} files in {safe(target)}"
    line = f"step {step}, part {part}: {tensors} tensors, {show_size(size)} in {where}"
    return Answer(data | {"dtype": wanted.dtype, "files": files}, [line])


def _with_part(reference: str, part: str) -> tuple[Catalog, int]:
    location, step = places.split(reference)
    run = places.run_of(location)
    return run, _newest_with(run, part) if step is None else step


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


@contextmanager
def _bar(reader: CheckpointReader, parts: Iterable[str]) -> Iterator[Callable[[int], None]]:
    """A progress bar at a terminal, over what is read of these parts."""
    there = [part for part in parts if part in reader.parts]
    size, done, lock = sum(share.size for part in there for share in reader.shares(part)), 0, threading.Lock()
    with progress.bar(lambda: (done, size), f"exporting step {reader.step}") as update:

        def read(count: int) -> None:
            nonlocal done
            with lock:
                done += count
                update()

        yield read
