"""Files of retired checkpoints, to be written over by later ones: blocks that are there are faster than new ones.

A file is set aside only when its checkpoint durably does not exist any more, and written over only where it has no
second name and nobody has it open or mapped. So nobody's bytes change: neither those of a checkpoint, whatever a power
cut leaves, nor those of a reader.
"""

from __future__ import annotations

import logging
import os
import threading

from asyncckpt.format import names
from asyncckpt.storage.posix import Posix

log = logging.getLogger("asyncckpt")
SMALLEST = 1 << 20
"""Bytes of a file below which nothing is gained."""


class Spares:
    """Those of one run, below `root`: one at most for each name of a file that this process writes."""

    def __init__(self, posix: Posix, root: str) -> None:
        self._posix, self._root = posix, root
        self._lock = threading.Lock()
        self._written: set[str] = set()
        self._kept: dict[str, str] = {}
        """Where the spare lies, by the name that it had."""

    def keep(self, path: str) -> None:
        """Set the file aside, if another of its name will be written. It must be of no checkpoint any more.

        Where that fails it stays where it is, to be removed with its folder.
        """
        name = os.path.basename(path)
        with self._lock:
            if name not in self._written or name in self._kept:
                return
            spare = os.path.join(self._root, names.new_spare())
            try:
                self._posix.rename(path, spare)
            except OSError as error:
                log.debug("%s is not set aside: %s", path, error)
            else:
                self._kept[name] = spare

    def take(self, path: str, size: int) -> int | None:
        """A spare as the new file `path`, open for writing around the page cache; None where there is none."""
        name = os.path.basename(path)
        with self._lock:
            if size >= SMALLEST:
                self._written.add(name)
            spare = self._kept.pop(name, None)
        if spare is None:
            return None
        try:
            return self._renamed(self._posix.reclaim(spare), spare, path)
        except OSError as error:
            log.debug("%s is not written over: %s", spare, error)
            self._remove(spare)
            return None

    def _renamed(self, fd: int, spare: str, path: str) -> int:
        try:
            self._posix.rename(spare, path)
        except OSError:
            self._posix.close(fd)
            raise
        return fd

    def drop(self) -> bool:
        """Give the disk their space; whether there were any. None are kept until files of their names are written."""
        with self._lock:
            self._written.clear()
            kept, self._kept = self._kept, {}
        for spare in kept.values():
            self._remove(spare)
        return bool(kept)

    def _remove(self, spare: str) -> None:
        try:
            self._posix.unlink(spare)
        except OSError as error:  # the next start removes it
            log.warning("removing %s: %s", spare, error)
