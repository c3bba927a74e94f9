"""Tensors to arena, in pieces that any number of threads may take.

Large contiguous tensors are moved in slices by `memmove`, which releases the GIL for each; many small ones go by one
foreach copy; strided ones by torch. As the pieces from the front of the arena are done, `staged` is told how far
the arena is what it will stay, so that writing begins while copying goes on.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterable
from functools import partial

import torch

from asyncckpt.errors import CheckpointError
from asyncckpt.snapshot import dtypes
from asyncckpt.snapshot.arena import Arena
from asyncckpt.snapshot.plan import PartPlan, Source

SLICE = 16 << 20
SMALL = 64 << 10
"""Tensors up to this many bytes are copied together: the Python around one copy would cost more than the copy."""
_STAGED_STEP = 8 << 20

Piece = tuple[int, Callable[[], None]]
"""Where in the arena something begins, and the call that puts it there."""


def pieces(plan: PartPlan, which: Iterable[int], base: int, arena: Arena) -> list[Piece]:
    """The pieces that copy the sources `which` of a part whose image begins at `base`."""
    small: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    first = base + plan.image.size
    found: list[Piece] = []
    for i in which:
        entry, source = plan.image.entries[i], plan.sources[i]
        offset = base + entry.offset
        if entry.nbytes == 0:
            continue
        on_cpu = source.data.device.type == "cpu"
        if entry.nbytes <= SMALL and on_cpu:
            small[0].append(_target(arena, offset, source))
            small[1].append(dtypes.as_plain(source.data))
            first = min(first, offset)
        elif source.contiguous and on_cpu:
            for start in range(0, entry.nbytes, SLICE):
                size = min(SLICE, entry.nbytes - start)
                found.append((offset + start, partial(_move, arena.address + offset + start, source.data, start, size)))
        else:
            found.append((offset, partial(_target(arena, offset, source).copy_, dtypes.as_plain(source.data))))  # type: ignore[arg-type]
    if small[0]:
        found.append((first, partial(_copy_many, *small)))
    return found


def _target(arena: Arena, offset: int, source: Source) -> torch.Tensor:
    """The place in the arena, as a row-major tensor of the source's shape."""
    plain = dtypes.as_plain(source.data)
    size = plain.numel() * plain.dtype.itemsize
    return arena.bytes[offset : offset + size].view(plain.dtype).view(plain.shape)


def _move(target: int, source: torch.Tensor, start: int, size: int) -> None:
    ctypes.memmove(target, _address(source) + start, size)


def _copy_many(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    for source in sources:
        _address(source)
    torch._foreach_copy_(targets, sources)


def _address(source: torch.Tensor) -> int:
    address = source.data_ptr()
    if not address:
        raise CheckpointError("the memory of a tensor was freed while it was being copied")
    return address


class CopyJob:
    """One snapshot being copied. `done` is called once, by the thread that ends the last piece, with its error or None.

    `pieces` may be run by several threads at once, by `work`; `wait` returns when `done` has returned.
    """

    def __init__(
        self,
        pieces: list[Piece],
        end: int,
        arena: Arena,
        staged: Callable[[int], None],
        done: Callable[[BaseException | None], None],
    ) -> None:
        self._pieces = sorted(pieces, key=lambda piece: piece[0])
        self._end = end
        self._arena = arena
        self._staged, self._done = staged, done
        self._lock = threading.Lock()
        self._next = 0
        self._finished = bytearray(len(self._pieces))
        self._front = 0
        self._told = 0
        self._left = len(self._pieces)
        self.error: BaseException | None = None
        self._over = threading.Event()
        if not self._pieces:
            self._finish()

    @property
    def over(self) -> bool:
        return self._over.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        return self._over.wait(timeout)

    def work(self) -> None:
        """Take pieces until none is left."""
        while True:
            with self._lock:
                index = self._next
                if index >= len(self._pieces):
                    return
                self._next += 1
            try:
                if self.error is None:
                    self._arena.reserve()
                    self._pieces[index][1]()
            except BaseException as error:
                self.error = error
            self._complete(index)

    def _complete(self, index: int) -> None:
        with self._lock:
            self._finished[index] = 1
            self._left -= 1
            while self._front < len(self._pieces) and self._finished[self._front]:
                self._front += 1
            last = self._left == 0
            upto = self._end if last else self._pieces[self._front][0]
            if self.error is None and (last or upto - self._told >= _STAGED_STEP):
                self._told = upto
                self._staged(upto)
        if last:
            self._finish()

    def _finish(self) -> None:
        try:
            self._done(self.error)
        finally:
            self._pieces = []
            self._over.set()
