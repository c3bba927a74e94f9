"""From a GPU: copies run on a side stream of their own into pinned arenas, and training waits on the device only.

This module has not yet run on a GPU (see the README); everything else works without it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch

from asyncckpt.errors import CheckpointError
from asyncckpt.snapshot import dtypes
from asyncckpt.snapshot.arena import Arena
from asyncckpt.snapshot.plan import PartPlan

_SEGMENT = 1 << 30
_PORTABLE = 1


def pin(arena: Arena) -> None:
    """Page-lock the arena, in segments, so that copies to it are asynchronous. Once an arena.

    Raises:
        CheckpointError: the driver refuses (more than it may lock).
    """
    if arena.pinned:
        return
    arena.reserve()
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    for start in range(0, arena.size, _SEGMENT):
        status = runtime.cudaHostRegister(arena.address + start, min(_SEGMENT, arena.size - start), _PORTABLE)
        if int(status) != 0:
            raise CheckpointError(f"can't pin an arena of {arena.size} bytes: CUDA error {int(status)}. See ulimit -l.")
        arena.before_close.append(partial(runtime.cudaHostUnregister, arena.address + start))
    arena.pinned = True


class DeviceCopies:
    """The copies of one snapshot from all devices. Holds its sources until it is dropped."""

    def __init__(self, streams: dict[torch.device, torch.cuda.Stream]) -> None:
        self._streams = streams
        self._events: dict[torch.device, torch.cuda.Event] = {}
        self._held: list[torch.Tensor] = []

    def __bool__(self) -> bool:
        return bool(self._events)

    def enqueue(self, plan: PartPlan, which: Iterable[int], base: int, arena: Arena) -> None:
        """Copy the sources `which`, as they are in the order of the current streams, without waiting for it."""
        for i in which:
            entry, source = plan.image.entries[i], plan.sources[i]
            if entry.nbytes == 0:
                continue
            device = source.data.device
            stream = self._streams.get(device)
            if stream is None:
                stream = self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            if device not in self._events:
                stream.wait_stream(torch.cuda.current_stream(device))
                self._events[device] = torch.cuda.Event()  # type: ignore[no-untyped-call]
            plain = dtypes.as_plain(source.data) if source.cast is None else source.data
            start = base + entry.offset
            target = arena.bytes[start : start + entry.nbytes].view(source.cast or plain.dtype).view(plain.shape)
            with torch.cuda.stream(stream):
                target.copy_(plain, non_blocking=True)
            self._held.append(plain)

    def mark(self) -> None:
        """What was enqueued until now is what `hold_back` and `wait` speak of."""
        for device, event in self._events.items():
            event.record(self._streams[device])

    def hold_back(self) -> None:
        """Let what the current streams do next wait, on the device, until the sources have been read."""
        for device, event in self._events.items():
            torch.cuda.current_stream(device).wait_event(event)

    def wait(self) -> None:
        """Return when the bytes are in the arena. Releases the GIL."""
        for event in self._events.values():
            event.synchronize()
        self._held.clear()
