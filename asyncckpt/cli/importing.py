"""`asyncckpt import`."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from asyncckpt import progress
from asyncckpt.cli import places
from asyncckpt.cli.answers import Answer, UsageError, safe
from asyncckpt.cli.units import show_size
from asyncckpt.errors import CheckpointNotFoundError
from asyncckpt.format import names
from asyncckpt.format.image import ITEM_SIZE, Spec
from asyncckpt.read import foreign
from asyncckpt.storage.local import LocalStorage
from asyncckpt.write.incoming import IncomingPart, store
from asyncckpt.write.streams import Source

FORMATS = ("safetensors", "dcp", "torch")
PICKLED = ("dcp", "torch")


def read_in(
    source: str, reference: str, kind: str | None, part: str | None, allow_pickle: bool, overwrite: bool
) -> Answer:
    """Commit what another format holds to a run."""
    path = Path(source)
    if not path.exists():
        raise CheckpointNotFoundError(f"{source}: there is nothing to import")
    if part is not None and not names.is_part(part):
        raise UsageError(f"--part {part}: give {names.PART_RULE}")
    kind = kind or _recognized(path)
    if kind not in FORMATS:
        raise UsageError(f"--format {kind}: give one of {', '.join(FORMATS)}")
    if kind in PICKLED and not allow_pickle:
        raise UsageError(
            f"{source} is {kind}, which is pickled: give --allow-pickle if you trust where it comes from. Only tensors "
            "and plain values are let through then, as torch.load(weights_only=True) has it."
        )
    location, step = places.split(reference)
    if "://" in location:
        raise UsageError(f"{location}: runs are kept in directories; give the path of one")
    parts = _safetensors(path, part or "model") if kind == "safetensors" else _pickled(kind, path, part)
    size, done, lock = sum(incoming.nbytes for incoming in parts), 0, threading.Lock()
    with progress.bar(lambda: (done, size), f"importing {source}") as update:

        def count(read: int) -> None:
            nonlocal done
            with lock:
                done += read
                update()

        counted = [replace(incoming, sources=[_Counted(s, count) for s in incoming.sources]) for incoming in parts]
        manifest = store(LocalStorage(location), counted, step, overwrite=overwrite)
    tensors = sum(len(incoming.specs) for incoming in parts)
    data = {"run": location, "step": manifest.step, "format": kind, "parts": manifest.parts, "bytes": manifest.size}
    line = (
        f"step {manifest.step} of {safe(location)}: {', '.join(manifest.parts)}; {tensors} tensors, {show_size(size)}"
    )
    return Answer(data | {"tensors": tensors}, [line])


class _Counted:
    """A source that tells how far it is."""

    def __init__(self, source: Source, count: Callable[[int], None]) -> None:
        self._source, self._count = source, count

    def __call__(self) -> Iterator[memoryview]:
        for data in self._source():
            yield data
            self._count(len(data))


def _recognized(path: Path) -> str:
    """By what is there; what is in it nobody has looked at."""
    if foreign.is_safetensors(path):
        return "safetensors"
    return "dcp" if path.is_dir() else "torch"


def _safetensors(path: Path, part: str) -> list[IncomingPart]:
    found = foreign.tensors(path)
    nodes = {name: {"$": "tensor", "n": name} for name in found}
    tree: object = nodes if "$" not in nodes else {"$": "dict", "v": [[name, node] for name, node in nodes.items()]}
    entries = [tensor.entry for tensor in found.values()]
    specs = [Spec(name, e.dtype, e.shape, ITEM_SIZE[e.dtype]) for name, e in zip(found, entries, strict=True)]
    return [IncomingPart(part, json.dumps(tree).encode(), specs, list(found.values()))]


def _pickled(kind: str, path: Path, part: str | None) -> list[IncomingPart]:
    from asyncckpt.integrations import pickled

    return pickled.read_dcp(path, part) if kind == "dcp" else pickled.read_torch(path, part)
