"""Finding what changed during an overlapped copy although no fence saw it.

Before and after the copy, every tensor's data pointer and version counter are compared. `.data` writes,
`vector_to_parameters` and fused kernels leave counters alone, so a few 32-bit words of every tensor in CPU memory
are compared as well: an update of whole tensors is found, one of a few rows may not be.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

_WORDS = 8192
_seeds = itertools.count()
_FIRST = 4096
_MEMORY: npt.NDArray[np.uint32] = np.frombuffer(
    memoryview((ctypes.c_uint8 * ((1 << 47) - _FIRST)).from_address(_FIRST)), np.uint32
)
"""All of this process's address space from `_FIRST` on, so that words of many tensors are read by one call."""


class Watched:
    """The tensors to watch, and where to look in them. Made once a layout, used for every save of it."""

    def __init__(self, names: Sequence[str], tensors: Sequence[torch.Tensor]) -> None:
        self.names = list(names)
        self.tensors = list(tensors)
        sizes = np.array([t.numel() * t.dtype.itemsize for t in tensors], np.int64)
        readable = np.array(
            [t.device.type == "cpu" and t.is_contiguous() and t.data_ptr() % 4 == 0 for t in tensors], np.bool_
        )
        self._sampled = np.flatnonzero(readable & (sizes >= 4))
        words = (sizes[self._sampled] // 4)[:, None]
        count = max(1, min(16, _WORDS // max(1, len(self._sampled))))
        spread = np.random.default_rng(next(_seeds)).random((len(self._sampled), count))
        self._offsets: npt.NDArray[np.int64] = (spread * words).astype(np.int64)

    def look(self) -> Look:
        """What can be seen of the tensors now."""
        pointers = [t.data_ptr() for t in self.tensors]
        versions = [t._version for t in self.tensors]
        starts = (np.array(pointers, np.int64)[self._sampled] - _FIRST) // 4
        return Look(self, pointers, versions, _MEMORY.take(starts[:, None] + self._offsets))


class Look:
    def __init__(
        self, watched: Watched, pointers: list[int], versions: list[int], words: npt.NDArray[np.uint32]
    ) -> None:
        self._watched = watched
        self._pointers, self._versions, self._words = pointers, versions, words

    def changed(self) -> tuple[str, ...]:
        """Names of the tensors that look otherwise now."""
        tensors, found = self._watched.tensors, set()
        for i, (t, pointer, version) in enumerate(zip(tensors, self._pointers, self._versions, strict=True)):
            if t.data_ptr() != pointer or t._version != version:
                found.add(i)
        if not found:
            now = self._watched.look()
            found.update(self._watched._sampled[(now._words != self._words).any(axis=1)].tolist())
        return tuple(self._watched.names[i] for i in sorted(found))
