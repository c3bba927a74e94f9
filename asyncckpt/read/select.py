"""Which checkpoint: the one asked for, or the newest that can be read and verifies."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import TypeVar

from asyncckpt.catalog.catalog import OURS, Catalog
from asyncckpt.errors import CheckpointNotFoundError, CorruptCheckpointError, StorageError

log = logging.getLogger("asyncckpt")
T = TypeVar("T")


def newest(catalog: Catalog, read: Callable[[int], T | None]) -> tuple[T | None, dict[int, str]]:
    """What `read` gives for the newest step that it can read, and does not answer with None: that one won't do.

    None where there is no such step. Also the damaged steps that were passed over, newest first, each with the reason;
    a warning names them.

    Raises:
        CorruptCheckpointError: there are checkpoints that might do, and every one is damaged. It never starts
            silently anew.
        StorageError: this process may not read, or has no room to: that says nothing of the checkpoint.
    """
    damaged: dict[int, str] = {}
    tried: set[int] = set()
    while True:
        step = next((s for s in catalog.candidates() if s not in tried), None)
        if step is None:
            break
        tried.add(step)
        try:
            result = read(step)
        except (CorruptCheckpointError, StorageError) as error:
            if isinstance(error, StorageError) and error.errno in OURS:
                raise
            if catalog.exists(step):
                damaged[step] = str(error)
            continue
        except CheckpointNotFoundError:
            if catalog.exists(step):
                raise
            continue  # retired by its owner while we were reading
        if result is None:
            continue
        if catalog.is_rewound(step):  # its manifest could not be read before
            continue
        if damaged:
            warnings.warn(f"{catalog.storage.url}: step {step} is used; passed over {_list(damaged)}", stacklevel=4)
        return result, damaged
    if damaged:
        raise CorruptCheckpointError(
            f"{catalog.storage.url}: every checkpoint {'that may do ' if len(tried) > len(damaged) else ''}is damaged: "
            f"{_list(damaged)}. Nothing was restored. "
            "Repair the storage, restore from a copy, or use a new directory to start from the beginning."
        )
    return None, damaged


def _list(damaged: dict[int, str]) -> str:
    return "; ".join(f"step {step} ({why})" for step, why in damaged.items())
