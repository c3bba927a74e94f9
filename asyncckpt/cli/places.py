"""Where a location on the command line becomes a storage, and a reference a checkpoint."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from asyncckpt.catalog.catalog import Catalog
from asyncckpt.cli.answers import UsageError
from asyncckpt.errors import CheckpointNotFoundError, ConflictError
from asyncckpt.format import names
from asyncckpt.storage.places import open_storage
from asyncckpt.storage.urls import is_url

if TYPE_CHECKING:
    from asyncckpt.read.reader import CheckpointReader
    from asyncckpt.storage.local import LocalStorage
    from asyncckpt.storage.object import ObjectStorage

_AT = re.compile(r"(.+)@(\d{1,19})", re.DOTALL)


def storage_of(location: str) -> LocalStorage | ObjectStorage:
    """The storage at `location`, a directory or a URL, whose credentials the environment holds.

    Raises:
        UsageError: not a kind of location that there is.
        CheckpointNotFoundError: nothing is there.
    """
    if not location or "\0" in location:
        raise UsageError(f"{location!r} is not the path of a run")
    try:
        storage = open_storage(location)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if is_url(storage.url):
        if not storage.list(""):
            raise CheckpointNotFoundError(f"no run at {location}: there is nothing")
    elif not os.path.isdir(storage.url):
        raise CheckpointNotFoundError(f"no run at {location}: it is not a directory")
    return storage


def run_of(location: str) -> Catalog:
    """The run at `location`: see `storage_of`."""
    return Catalog(storage_of(location))


@contextmanager
def owned(storage: LocalStorage | ObjectStorage) -> Iterator[Callable[[], None]]:
    """Own the run in `storage` meanwhile; gives what raises where that is so no more.

    Raises:
        ConflictError: a live writer owns it.
    """
    from asyncckpt.catalog.ownership import own

    patience = 0.0
    if is_url(storage.url):
        from asyncckpt.catalog.lease import LEASE

        patience = 1.5 * LEASE  # until a writer of another machine is known to be dead
    try:
        ownership = own(storage, patience)
    except ConflictError as error:
        raise ConflictError(
            f"{storage.url} is being written by process {error.pid or 'unknown'}. Its own policy deletes there; stop "
            "it before you do.",
            pid=error.pid,
        ) from None
    try:
        yield ownership.check
    finally:
        ownership.release()


def split(reference: str) -> tuple[str, int | None]:
    """The location of a run, and the step where `reference` names one.

    RUN, RUN@100 or RUN/step-00000100. RUN may be a URL. A directory that is there by the whole name is taken as a run.
    """
    parent, name = os.path.split(reference.rstrip("/"))
    step = names.parse_step(name)
    if step is not None:
        return parent or ".", step
    match = _AT.fullmatch(reference)
    if match and not os.path.isdir(reference):
        return match[1], int(match[2])
    return reference, None


def checkpoint_of(reference: str) -> tuple[Catalog, int]:
    """The run and step that `reference` names; without a step, the newest that was not left by a rewind.

    Raises:
        UsageError, CheckpointNotFoundError: see `storage_of`; or nothing is committed.
    """
    location, step = split(reference)
    run = run_of(location)
    if step is None:
        step = max(run.candidates(), default=None)
    if step is None:
        raise CheckpointNotFoundError(f"no checkpoint in {run.storage.url}")
    return run, step


def reader_of(reference: str) -> CheckpointReader:
    """The checkpoint that `reference` names, its records verified.

    Raises:
        UsageError, CheckpointNotFoundError: see `checkpoint_of`; or the step is not committed.
        CorruptCheckpointError: a record is damaged.
    """
    from asyncckpt.read.reader import CheckpointReader

    return CheckpointReader(*checkpoint_of(reference))
