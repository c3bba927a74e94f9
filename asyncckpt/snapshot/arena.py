"""Arenas: regions of memory that snapshots are copied into, taken once and reused.

With a writer process an arena is a memfd that both processes map: private, without a name, gone with its last user.
Its pages are reserved before the first byte is copied, so that too little memory is an exception and not a SIGBUS;
touching them is slow (0.3-2 GB/s) and happens once.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import threading
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import torch

from asyncckpt.errors import CheckpointError
from asyncckpt.snapshot.available import available_memory

PAGE = 4096
_PIECE = 32 << 20
_LARGE = 4 << 20
"""From so many bytes on, huge pages are asked for, which are fewer to pin for each write."""
_MADV_POPULATE_WRITE = 23  # Linux 5.14
_MARGIN = 64 << 20
_numbers = itertools.count(1)
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Arena:
    """`size` bytes (whole pages) at `address`; `fd` is the memfd where it is shared with a process."""

    def __init__(self, size: int, shared: bool) -> None:
        self.id = next(_numbers)
        self.size = -(-size // PAGE) * PAGE
        self.fd: int | None = None
        try:
            if shared:
                self.fd = os.memfd_create("asyncckpt-arena", os.MFD_CLOEXEC)
                os.ftruncate(self.fd, self.size)
            self._map = mmap.mmap(-1 if self.fd is None else self.fd, self.size)
            if hasattr(mmap, "MADV_HUGEPAGE") and self.size >= _LARGE:
                with suppress(OSError):  # a kernel without them
                    self._map.madvise(mmap.MADV_HUGEPAGE)
        except OSError as error:
            if self.fd is not None:
                os.close(self.fd)
            raise _refused(self.size, error) from error
        self.memory = memoryview(self._map)
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self.address = self.bytes.data_ptr()
        self.ready = False
        """Whether its pages are there."""
        self.pinned = False
        """Whether its pages are locked for a GPU."""
        self.before_close: list[Callable[[], None]] = []
        """What has to be undone before the memory is given back."""
        self._lock = threading.Lock()

    def reserve(self) -> None:
        """Take and touch all pages, unless that is done. Releases the GIL.

        Raises:
            CheckpointError: there is not enough memory.
        """
        with self._lock:
            if self.ready:
                return
            for start in range(0, self.size, _PIECE):
                self._take(start, min(_PIECE, self.size - start))
            self.ready = True

    def _take(self, start: int, size: int) -> None:
        if _libc.madvise(self.address + start, size, _MADV_POPULATE_WRITE) == 0:
            return
        if self.fd is not None:  # an older kernel, or no memory
            try:
                os.posix_fallocate(self.fd, start, size)
            except OSError as error:
                raise _refused(self.size, error) from error
        np.frombuffer(self._map, np.uint8, size, start)[::PAGE] = 0

    def close(self) -> None:
        """Give the memory back as soon as nothing in this process refers to it."""
        for undo in self.before_close:
            undo()
        self.before_close.clear()
        fd, self.fd = self.fd, None
        if fd is not None:
            os.close(fd)


def _refused(size: int, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"no memory for a snapshot arena of {size} bytes: {error.strerror or error}. "
        "Lower max_in_flight, save fewer parts, or raise the limits of this process (ulimit -v, -n, -f)."
    )


class ArenaPool:
    """At most `count` arenas and `limit` bytes. Not safe for threads: its owner holds a lock.

    An exception (a signal handler may raise one anywhere) loses no arena: until it is given back, `take_back` finds it
    by its lessee.
    """

    def __init__(self, count: int, limit: int | None, shared: bool) -> None:
        self.count = count
        self._limit = limit
        self._shared = shared
        self._free: list[Arena] = []
        self._leased: dict[int, tuple[Arena, object]] = {}
        self._sizes: dict[int, int] = {}

    @property
    def total(self) -> int:
        """Bytes of all arenas."""
        return sum(self._sizes.values())

    @property
    def leased(self) -> int:
        return len(self._leased)

    def lease(self, size: int, lessee: object) -> Arena | None:
        """An arena of at least `size` bytes for `lessee`, or None until one comes back.

        Raises:
            CheckpointError: it would not fit into `limit`, or into what memory is left, even with no other.
        """
        for arena in self._free:
            if arena.size >= size:
                self._leased[arena.id] = (arena, lessee)
                self._free.remove(arena)
                return arena
        for arena in self._free:
            self._discard(arena)
        self._free.clear()
        if len(self._leased) >= self.count:
            return None
        if self._limit is not None and self.total + size > self._limit:
            if self._leased:
                return None
            raise CheckpointError(
                f"a snapshot takes {size} bytes, and memory_limit is {self._limit}. Raise it, or save fewer parts."
            )
        available = available_memory()
        if available is not None and size + _MARGIN > available:
            if self._leased:
                return None
            raise CheckpointError(
                f"a snapshot takes {size} bytes of memory beside the training, and {available} are available. "
                "Save fewer parts, or use a machine with more memory."
            )
        arena = Arena(size, self._shared)
        self._leased[arena.id] = (arena, lessee)
        self._sizes[arena.id] = arena.size
        return arena

    def give_back(self, arena: Arena) -> None:
        if arena not in self._free:
            self._free.append(arena)
        self._leased.pop(arena.id, None)

    def take_back(self, lessee: object) -> None:
        """Give back what it has leased, if anything."""
        for arena in [arena for arena, by in self._leased.values() if by is lessee]:
            self.give_back(arena)

    def close(self) -> None:
        for arena in self._free:
            self._discard(arena)
        self._free.clear()

    def _discard(self, arena: Arena) -> None:
        self._sizes.pop(arena.id, None)
        arena.close()
