"""Tensors to arena, in pieces that any number of threads may take.

Large contiguous tensors are moved in slices by `memmove`, which releases the GIL for each (those that are cast, by
torch); small ones that come to lie side by side go by one concatenation into their place; strided ones by torch. As the
pieces from the front of the arena are done, `staged` is told how far the arena is what it will stay, so that writing
begins while copying goes on.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch

from asyncckpt.errors import CheckpointError
from asyncckpt.format.image import Entry
from asyncckpt.snapshot import dtypes
from asyncckpt.snapshot.arena import Arena
from asyncckpt.snapshot.plan import PartPlan

SLICE = 2 << 20
"""Bytes that are copied at once, and that then still lie in a core's caches: chunks are of whole slices."""
SMALL = 64 << 10
"""Tensors up to this many bytes are copied together: the Python around one copy would cost more than the copy."""
_MANY = 4096
"""So many at most: torch holds the GIL while it looks through them."""
_GRAIN = 32767
"""Items that torch copies without threads of its own: those belong to the training."""
_STAGED_STEP = 32 << 20
"""How far it goes on until it is told again: a chunk for each of the writer's threads. A disk takes longer for them."""


class Piece(NamedTuple):
    """Where in the arena something begins, how many bytes it is, and the call that puts it there."""

    offset: int
    size: int
    copy: Callable[[], None]


def pieces(plan: PartPlan, which: Iterable[int], base: int, arena: Arena) -> list[Piece]:
    """The pieces that copy the sources `which` of a part whose image begins at `base`.

    Of what is contiguous in CPU memory each lies in one slice of the image.
    """
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
            copy = partial(_place(arena, offset, data.shape, dtype).copy_, data)
            found.append(Piece(offset, entry.nbytes, copy))  # type: ignore[arg-type]
        elif entry.nbytes <= SMALL and entry.offset // SLICE == (entry.offset + entry.nbytes - 1) // SLICE:
            small.append((offset, data.view(-1), dtype))
        elif source.cast is not None:
            target, flat, width = _place(arena, offset, (data.numel(),), dtype), data.view(-1), dtype.itemsize
            for begin, end in _slices(entry):
                of = slice(begin // width, end // width)
                found.append(Piece(offset + begin, end - begin, partial(_cast, target[of], flat[of])))
        else:
            for begin, end in _slices(entry):
                move = partial(_move, arena.address + offset + begin, source.data, begin, end - begin)
                found.append(Piece(offset + begin, end - begin, move))
    small.sort(key=lambda item: item[0])
    for offset, run, dtype in _runs(small, base):
        items = sum(t.numel() for t in run)
        target = _place(arena, offset, (items,), dtype)
        found.append(Piece(offset, items * dtype.itemsize, partial(_copy_many, target, run)))
    return found


def _slices(entry: Entry) -> Iterator[tuple[int, int]]:
    """The ranges of an entry, from its begin, that end where a slice of the image does, or with it."""
    begin = 0
    while begin < entry.nbytes:
        end = min(entry.nbytes, ((entry.offset + begin) // SLICE + 1) * SLICE - entry.offset)
        yield begin, end
        begin = end


def _runs(
    small: list[tuple[int, torch.Tensor, torch.dtype]], base: int
) -> Iterator[tuple[int, list[torch.Tensor], torch.dtype]]:
    """Tensors of one dtype that lie next to each other in one slice of the image at `base`, together: where they begin,
    and as what dtype."""
    run: list[torch.Tensor] = []
    begin = end = 0
    becomes = torch.uint8
    for offset, tensor, dtype in small:
        apart = offset != end or (offset - base) % SLICE == 0 or len(run) == _MANY
        if run and (apart or tensor.dtype is not run[0].dtype or dtype is not becomes):
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
        self._pieces = sorted(pieces, key=lambda piece: piece.offset)
        self._end = end
        self._arena = arena
        self._staged, self._done = staged, done
        self._changed = threading.Condition()
        self._next = 0
        self._busy: set[int] = set()
        """The threads that have taken a piece."""
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
                    self._pieces[index].copy()
            except BaseException as error:
                self.error = error
                if not isinstance(error, Exception):
                    interrupt = error
            self._complete(index)
        if interrupt is not None:
            self.wait()
            raise interrupt

    def abandon(self, error: BaseException) -> None:
        """Return when no other thread copies anything of it any more, or ever will."""
        with self._changed:
            self.error = self.error or error
            self._changed.wait_for(lambda: self._busy <= {threading.get_ident()})

    def _take(self) -> int | None:
        with self._changed:
            if self._next >= len(self._pieces):
                return None
            self._busy.add(threading.get_ident())
            self._next += 1
            return self._next - 1

    def _complete(self, index: int) -> None:
        with self._changed:
            self._busy.discard(threading.get_ident())
            self._changed.notify_all()
            self._finished[index] = 1
            self._left -= 1
            while self._front < len(self._pieces) and self._finished[self._front]:
                self._front += 1
            last = self._left == 0
            upto = self._end if last else self._pieces[self._front].offset
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
