"""A run and its mirror, read as one: what is here first, and what is not here, or damaged, from there.

Where the mirror can't be read, and there are checkpoints here, these are all that there are, and a warning says so;
where there are none it raises: a training never starts anew because its mirror was not to be reached.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from asyncckpt.catalog.catalog import Catalog
from asyncckpt.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError, StorageError
from asyncckpt.format.manifest import Manifest, Notes, Rewinds
from asyncckpt.storage.base import Storage

log = logging.getLogger("asyncckpt")
T = TypeVar("T")
U = TypeVar("U")
_ANSWER = 60.0
"""Seconds that the mirror has to answer what it holds."""
_AGAIN = 60.0
"""Seconds for which a mirror that did not answer is not asked again."""


class Tiers(Catalog):
    """The checkpoints in `here` and `there`. `storage` is that of here."""

    def __init__(self, here: Storage, there: Storage) -> None:
        super().__init__(here)
        self._here, self._there = Catalog(here), Catalog(there)
        self._silent_until = 0.0
        self._silence = ""

    def tiers(self, step: int) -> list[Catalog]:
        """Where `step` is, that which was committed last first, and here first of the same; what was left by a rewind
        only where there is nothing else."""
        rewinds = self.rewinds()
        found: list[tuple[bool, float, Catalog]] = []
        for catalog in (self._here, self._there):
            try:
                manifest = self._manifest_in(catalog, step)
            except CheckpointNotFoundError:
                continue
            except (CorruptCheckpointError, StorageError):
                found.append((False, -math.inf, catalog))  # whoever reads it is told
            else:
                found.append((rewinds.covers(manifest), -manifest.sequence, catalog))
        found.sort(key=lambda item: item[:2])
        return [catalog for left, _, catalog in found if not left or found[0][0]]

    def _manifest_in(self, catalog: Catalog, step: int) -> Manifest:
        if catalog is self._here:
            return catalog.manifest(step)
        manifest = self._ask(lambda: _or_none(catalog, step), None)
        if manifest is None:
            raise CheckpointNotFoundError(f"no checkpoint of step {step} in {catalog.storage.url}")
        return manifest

    def committed(self) -> list[int]:
        return sorted({*self._here.committed(), *self._committed_there()})

    def folders(self) -> list[int]:
        return sorted({*self._here.folders(), *self._committed_there()})

    def exists(self, step: int) -> bool:
        return self._here.exists(step) or self._ask(lambda: self._there.exists(step), False)

    def manifest(self, step: int) -> Manifest:
        failure: CheckpointError | None = None
        for catalog in self.tiers(step):
            try:
                return catalog.manifest(step)
            except (CheckpointNotFoundError, CorruptCheckpointError, StorageError) as error:
                failure = failure or error
        raise failure or CheckpointNotFoundError(
            f"no checkpoint of step {step} in {self.storage.url}, nor in {self._there.storage.url}"
        )

    def notes(self, step: int) -> Notes | None:
        return (self._here if self._here.exists(step) else self._there).notes(step)

    def rewinds(self) -> Rewinds:
        known = self._here.rewinds().rewinds
        there = self._ask(self._there.rewinds, Rewinds()).rewinds
        return Rewinds(rewinds=[*known, *(rewind for rewind in there if rewind not in known)])

    def _committed_there(self) -> list[int]:
        """
        Raises:
            StorageError: no answer, and there is nothing here.
        """
        found = self._ask(self._there.committed, None)
        if found is None and not self._here.committed():
            raise StorageError(
                f"{self.storage.url} has no checkpoint, and whether its mirror has can't be told: {self._silence}",
                retryable=True,
            )
        return found or []

    def _ask(self, question: Callable[[], T], otherwise: U) -> T | U:
        """What the mirror answers in time; `otherwise`, where it does not, or is damaged itself."""
        if time.monotonic() < self._silent_until:
            return otherwise
        try:
            return _in_time(question, f"{self._there.storage.url} does not answer within {_ANSWER:g} s")
        except (StorageError, CorruptCheckpointError) as error:
            log.warning("the mirror is left out: %s", error)
            self._silence, self._silent_until = str(error), time.monotonic() + _AGAIN
            return otherwise


def _or_none(catalog: Catalog, step: int) -> Manifest | None:
    """None where it is not committed, or damaged."""
    try:
        return catalog.manifest(step)
    except (CheckpointNotFoundError, CorruptCheckpointError):
        return None


def _in_time(question: Callable[[], T], late: str) -> T:
    """The answer, by a thread that may hang for ever."""
    answers: list[T] = []
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            answers.append(question())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=ask, name="asyncckpt-ask", daemon=True)
    thread.start()
    thread.join(_ANSWER)
    if errors:
        raise errors[0]
    if not answers:
        raise StorageError(late, retryable=True)
    return answers[0]
