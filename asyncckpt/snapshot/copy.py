"""Tensors to arena, in pieces that any number of threads may take.

Large contiguous tensors are moved in slices by `memmove`, which releases the GIL for each (those that are cast, by
torch); small ones that come to lie side by side go by one concatenation into their place; strided ones by torch. As the
pieces from the front of the arena are done, `staged` is told how far the arena is what it will stay, so that writing
begins while copying goes on.
"""

from __future__ import annotations

import bisect
import ctypes
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch

from asyncckpt.errors import CheckpointError
from asyncckpt.format.image import Entry
from asyncckpt.snapshot import dtypes
from asyncckpt.snapshot.arena import Arena
from asyncckpt.snapshot.plan import PartPlan

SLICE = 16 << 20
SMALL = 64 << 10
"""Tensors up to this many bytes are copied together: the Python around one copy would cost more than the copy."""
_MANY = 4096
"""So many at most: torch holds the GIL while it looks through them."""
_GRAIN = 32767
"""Items that torch copies without threads of its own: those belong to the training."""
_STAGED_STEP = 8 << 20

Piece = tuple[int, Callable[[], None]]
"""Where in the arena something begins, and the call that puts it there."""


def pieces(
    plan: PartPlan, which: Iterable[int], base: int, arena: Arena, but: Sequence[tuple[int, int]] = ()
) -> list[Piece]:
    """The pieces that copy the sources `which` of a part whose image begins at `base`.

    Somebody else sees to the ranges `but` of the image: they are in order, and hold only tensors in CPU memory that are
    contiguous and not cast.
    """
    ends = [end for _, end in but]
    small: list[tuple[int, torch.Tensor, torch.dtype]] = []
    found: list[Piece] = []
    for i in which:
        entry, source = plan.image.entries[i], plan.sources[i]
        offset = base + entry.offset
        if entry.nbytes == 0:
            continue
        data = dtypes.as_plain(source.data) if source.cast is None else source.data
        dtype = source.cast or data.dtype
        if data.device.type != "cpu" or not source.contiguous:
            found.append((offset, partial(_place(arena, offset, data.shape, dtype).copy_, data)))  # type: ignore[arg-type]
        elif entry.nbytes <= SMALL and source.cast is None and _within(entry, but, ends):
            continue
        elif entry.nbytes <= SMALL:
            small.append((offset, data.view(-1), dtype))
        elif source.cast is not None:
            target = _place(arena, offset, (data.numel(),), dtype)
            step = SLICE // dtype.itemsize
            for start in range(0, data.numel(), step):
                cast = partial(_cast, target[start : start + step], data.view(-1)[start : start + step])
                found.append((offset + start * dtype.itemsize, cast))
        else:
            for begin, end in _outside(entry, but, ends):
                for start in range(begin, end, SLICE):
                    move = partial(_move, arena.address + offset + start, source.data, start, min(SLICE, end - start))
                    found.append((offset + start, move))
    small.sort(key=lambda item: item[0])
    for offset, run, dtype in _runs(small):
        items = sum(t.numel() for t in run)
        found.append((offset, partial(_copy_many, _place(arena, offset, (items,), dtype), run)))
    return found


def _outside(entry: Entry, but: Sequence[tuple[int, int]], ends: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The ranges of an entry, from its begin, that lie in none of `but`, whose ends are `ends`."""
    position, last = entry.offset, entry.offset + entry.nbytes
    for begin, end in but[bisect.bisect_right(ends, position) :]:
        if begin >= last:
            break
        if position < begin:
            yield position - entry.offset, begin - entry.offset
        position = max(position, end)
    if position < last:
        yield position - entry.offset, entry.nbytes


def _within(entry: Entry, but: Sequence[tuple[int, int]], ends: Sequence[int]) -> bool:
    return next(_outside(entry, but, ends), None) is None


def _runs(
    small: list[tuple[int, torch.Tensor, torch.dtype]],
) -> Iterator[tuple[int, list[torch.Tensor], torch.dtype]]:
    """Tensors of one dtype that lie next to each other in the arena, together, where they begin, and as what dtype."""
    run: list[torch.Tensor] = []
    begin = end = 0
    becomes = torch.uint8
    for offset, tensor, dtype in small:
        if run and (offset != end or tensor.dtype is not run[0].dtype or dtype is not becomes or len(run) == _MANY):
            yield begin, run, becomes
            run = []
        if not run:
            begin, becomes = offset, dtype
        run.append(tensor)
        end = offset + tensor.numel() * dtype.itemsize
    if run:
        yield begin, run, becomes


def _place(arena: Arena, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A row-major tensor in the arena."""
    size = math.prod(shape) * dtype.itemsize
    return arena.bytes[offset : offset + size].view(dtype).view(shape)


def _move(target: int, source: torch.Tensor, start: int, size: int) -> None:
    ctypes.memmove(target, address_of(source) + start, size)


def _cast(target: torch.Tensor, source: torch.Tensor) -> None:
    address_of(source)
    torch._foreach_copy_(list(target.split(_GRAIN)), list(source.split(_GRAIN)))  # type: ignore[no-untyped-call]


def _copy_many(target: torch.Tensor, sources: list[torch.Tensor]) -> None:
    for source in sources:
        address_of(source)
    torch.cat(sources, out=target)


def address_of(source: torch.Tensor) -> int:
    """Where its memory begins, which may have been freed since it was looked at."""
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
        """Take pieces until none is left. What interrupts this thread ends the job, and is raised when it is over."""
        interrupt: BaseException | None = None
        while (index := self._take()) is not None:
            try:
                if self.error is None:
                    self._arena.reserve()
                    self._pieces[index][1]()
            except BaseException as error:
                self.error = error
                if not isinstance(error, Exception):
                    interrupt = error
            self._complete(index)
        if interrupt is not None:
            self.wait()
            raise interrupt

    def _take(self) -> int | None:
        with self._lock:
            if self._next >= len(self._pieces):
                return None
            self._next += 1
            return self._next - 1

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
