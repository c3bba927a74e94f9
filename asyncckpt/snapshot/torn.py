"""Finding what changed during an overlapped copy although no fence saw it.

Before and after the copy, every tensor's data pointer and version counter are compared. `.data` writes,
`vector_to_parameters` and fused kernels leave counters alone, so a few 32-bit words of every tensor in CPU memory
are compared as well: an update of whole tensors is found, one of a few rows may not be.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from asyncckpt.snapshot.memory import FIRST, SPACE
from asyncckpt.snapshot.plan import is_dense

Integers = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint32]
_WORDS = 8192
_seeds = itertools.count()
_MEMORY: Words = np.frombuffer(SPACE, np.uint32)
"""So words of many tensors are read by one call."""


class Watched:
    """The tensors to watch, and where to look in them. Made once a layout, used for every save of it."""

    def __init__(self, names: Sequence[str], tensors: Sequence[torch.Tensor]) -> None:
        self.names = list(names)
        self.tensors = list(tensors)
        sizes = np.array([t.numel() * t.dtype.itemsize for t in tensors], np.int64)
        readable = np.array(
            [t.device.type == "cpu" and is_dense(t) and t.data_ptr() % 4 == 0 for t in tensors], np.bool_
        )
        self._sampled = np.flatnonzero(readable & (sizes >= 4))
        words = (sizes[self._sampled] // 4)[:, None]
        count = max(1, min(16, _WORDS // max(1, len(self._sampled))))
        spread = np.random.default_rng(next(_seeds)).random((len(self._sampled), count))
        self._offsets: Integers = (spread * words).astype(np.int64)

    def look(self) -> Look:
        """What can be seen of the tensors now."""
        pointers, versions = self.pointers(), self.versions()
        return Look(self, pointers, versions, self._words(pointers, self._sampled, self._offsets))

    def pointers(self) -> Integers:
        return np.array([t.data_ptr() for t in self.tensors], np.int64)

    def versions(self) -> Integers:
        return np.array([t._version for t in self.tensors], np.int64)

    def rewritten(self, pointers: Integers, words: Words, moved: npt.NDArray[np.bool_]) -> Integers:
        """Which of the tensors that have not moved hold other words now. One that moved may have become smaller."""
        rows = np.flatnonzero(~moved[self._sampled])
        now = self._words(pointers, self._sampled[rows], self._offsets[rows])
        found: Integers = self._sampled[rows[(now != words[rows]).any(axis=1)]]
        return found

    def _words(self, pointers: Integers, which: Integers, offsets: Integers) -> Words:
        return _MEMORY.take((pointers[which, None] - FIRST) // 4 + offsets)


class Look:
    def __init__(self, watched: Watched, pointers: Integers, versions: Integers, words: Words) -> None:
        self._watched = watched
        self._pointers, self._versions, self._words = pointers, versions, words

    def changed(self) -> tuple[str, ...]:
        """Names of the tensors that look otherwise now."""
        watched = self._watched
        moved = watched.pointers() != self._pointers
        changed = moved | (watched.versions() != self._versions)
        changed[watched.rewritten(self._pointers, self._words, moved)] = True
        return tuple(watched.names[i] for i in np.flatnonzero(changed))
