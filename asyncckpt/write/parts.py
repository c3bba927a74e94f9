"""A part on its way to durable files: where it goes, what is left of it, and what all writers of parts can do.

Writers of parts are made, used and finished on worker threads; `write` is called from several at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import msgspec

from asyncckpt.format.manifest import FileRecord, PartRecord
from asyncckpt.storage.base import Storage
from asyncckpt.write.meter import Meter

NO_TREE = msgspec.Raw(b"null")
"""Stands in the record of a part until its tree is known."""


@dataclass(frozen=True)
class Place:
    """Where a part goes: the folder of the attempt, and its bytes."""

    storage: Storage
    folder: str
    attempt: str
    part: str
    file: str
    """What its image is called, where that is stored as it is."""
    size: int
    chunk_size: int
    meter: Meter
    rank: int | None = None
    """Of one of several, whose share of the part it is."""


@dataclass(frozen=True)
class WrittenPart:
    """A part whose files are durable. Its record lacks the tree; `files` are all that it needs, by name.

    `written` are the bytes of those that are new.
    """

    record: PartRecord
    files: dict[str, FileRecord]
    written: int
    direct: bool


class PartWriter(Protocol):
    def write(self, index: int, data: memoryview, found: str) -> None:
        """Take chunk `index`, whose digest is `found`."""

    def same(self, index: int, length: int, found: str) -> None:
        """Take chunk `index`, of so many bytes, as it was committed last, with the digest `found`."""

    def finish(self) -> WrittenPart:
        """Return only when all bytes are durable."""

    def abort(self) -> None:
        """Give the part up; never raises."""
