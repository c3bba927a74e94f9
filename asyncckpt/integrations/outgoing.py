"""Checkpoints as other formats that are pickled have them: whole, or one part. In bounded memory, by way of a file."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from asyncckpt.errors import CheckpointError, CheckpointExistsError, StorageError, UnsupportedStateError
from asyncckpt.integrations import pickled
from asyncckpt.integrations.dcp import keys
from asyncckpt.read.export import new_file, settle
from asyncckpt.read.reader import CheckpointReader
from asyncckpt.read.spool import spooled
from asyncckpt.snapshot.rebuild import Rebuilder


def export(
    reader: CheckpointReader,
    part: str | None,
    target: Path,
    kind: str,
    *,
    overwrite: bool = False,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """Write the value of `part`, or a dict of all parts, to `target`: a file of torch.save, or a directory of DCP.

    Every byte is verified before. The target appears whole and durable, or not at all; beside it there must be room for
    a file of the same size meanwhile. Returns the parts. Of what each rank had of its own it is that of rank 0.

    Raises:
        CheckpointNotFoundError: no such part.
        CheckpointExistsError: the target is there already, and `overwrite` is not given, or it is a directory.
        CorruptCheckpointError: a byte is not what was committed. Nothing was written.
        UnsupportedStateError: DCP can hold a dict only.
        StorageError: it can't be written.
    """
    if os.path.lexists(target) and (not overwrite or kind == "dcp"):
        raise CheckpointExistsError(f"{target} is there already; nothing was written")
    parts = [name for name in reader.manifest.resumable if name != keys.KEYS] if part is None else [part]
    with ExitStack() as held:
        spools = {name: held.enter_context(spooled(reader, name, target.parent, on_bytes)) for name in parts}
        values = {name: Rebuilder(spools[name].image).decode(reader.tree(name)) for name in parts}
        state: Any = values[parts[0]] if parts == [part] or parts == [keys.ROOT] else values

        def forget() -> None:
            for spool in spools.values():
                spool.forget()

        if kind == "torch":
            with new_file(target, 0, overwrite) as number, open(number, "wb", buffering=0, closefd=False) as file:
                pickled.write_torch(state, file, forget)
        elif isinstance(state, Mapping):
            with _new_folder(target) as folder:
                pickled.write_dcp(dict(state), folder, forget)
        else:
            raise UnsupportedStateError(f"{parts[0]} is no dict, and DCP saves only these", path=parts[0])
    return parts


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder that takes the name `target` at the end of the block, durably."""
    temporary = target.parent / f".{target.name}-{secrets.token_hex(6)}.tmp"
    try:
        temporary.mkdir()
        try:
            yield temporary
            settle(temporary)
            os.rename(temporary, target)
            settle(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except CheckpointError:
        raise
    except OSError as error:
        raise StorageError(f"{target}: {error.strerror or error}", errno=error.errno) from error
