"""DCP's stager: a copy of the state in memory that is taken once and used again."""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import torch
from torch.distributed.checkpoint.staging import AsyncStager

from asyncckpt.errors import CheckpointError, UnsupportedStateError
from asyncckpt.format.tree import Path, show
from asyncckpt.snapshot import dtypes
from asyncckpt.snapshot.arena import Arena
from asyncckpt.snapshot.cuda import pin
from asyncckpt.snapshot.plan import is_dense
from asyncckpt.snapshot.sharded import is_dtensor, local

_ALIGN = 64


@dataclass
class _Copy:
    """A tensor on its way into the region: `source`, where it goes, and what stands for it in the staged state."""

    source: torch.Tensor
    offset: int
    staged: torch.Tensor | None = None


class Stager(AsyncStager):
    """Copies a state for `dcp.async_save(..., async_stager=Stager())` before that returns; training may go on then.

    All tensors go into one region of memory, page-locked where some are on a GPU. It is used again as soon as no tensor
    of the staged state is referred to any more, whether that save has ended well or not; until then another is taken.
    So keep one Stager for all saves, and close it after the last. Values that are no tensors are deep copies.

    Raises:
        UnsupportedStateError: a tensor that is more than strided bytes.
        CheckpointError: there is no memory for the copy.
    """

    _synchronize_after_execute = False

    def __init__(self) -> None:
        self._free: list[Arena] = []
        self._returned: SimpleQueue[Arena] = SimpleQueue()
        self._closed = False

    def stage(self, state_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        if self._closed:
            raise CheckpointError("this stager is closed; make another one")
        copies: dict[int, _Copy] = {}
        size = _plan(state_dict, (), copies, 0)
        region = self._lease(size)
        on_gpu = {c.source.device for c in copies.values() if c.source.device.type == "cuda"}
        try:
            if on_gpu:
                pin(region)
            else:
                region.reserve()
        except BaseException:
            self._give_back(region)
            raise
        window = memoryview(region.memory)
        weakref.finalize(window, self._give_back, region).atexit = False
        base = torch.frombuffer(window, dtype=torch.uint8)
        for item in copies.values():
            item.staged = _copied(item, base)
        for device in on_gpu:
            torch.cuda.current_stream(device).synchronize()
        staged: dict[str, Any] = _rebuilt(state_dict, copies)
        return staged

    def synchronize_staging(self) -> None:
        """All is copied when `stage` returns."""

    def close(self) -> None:
        """Give the memory back: what is in use, when it is not any more."""
        self._closed = True
        for region in self._idle():
            region.close()

    def _lease(self, size: int) -> Arena:
        """A region that is free and large enough; those that are too small go."""
        idle = self._idle()
        fitting = [region for region in idle if region.size >= size]
        for region in idle:
            if region not in fitting:
                region.close()
        self._free = fitting[1:]
        return fitting[0] if fitting else Arena(max(size, 1), shared=False)

    def _idle(self) -> list[Arena]:
        """The regions that are not in use, taken out of where they are kept."""
        idle, self._free = self._free, []
        with suppress(Empty):
            while True:
                idle.append(self._returned.get_nowait())
        return idle

    def _give_back(self, region: Arena) -> None:
        """Called wherever the last tensor goes, on any thread."""
        if self._closed:
            region.close()
        else:
            self._returned.put(region)


def _plan(value: Any, path: Path, copies: dict[int, _Copy], offset: int) -> int:
    """Give each tensor in `value` its place, once however often it stands there; returns the end of the last."""
    if isinstance(value, torch.Tensor):
        if id(value) in copies:
            return offset
        source = local(value).detach()
        plain = not is_dtensor(source) and type(source) in (torch.Tensor, torch.nn.Parameter)
        if not plain or source.layout != torch.strided or source.dtype in dtypes.QUANTIZED or source.is_meta:
            raise UnsupportedStateError(
                f"{show(path)} is a {type(value).__qualname__} of layout {source.layout} and dtype {source.dtype} on "
                f"{source.device}, which can't be staged: only plain tensors and DTensors can",
                path=show(path),
            )
        copies[id(value)] = _Copy(source, offset)
        return offset + -(-source.numel() * source.dtype.itemsize // _ALIGN) * _ALIGN
    if isinstance(value, Mapping):
        for key, item in value.items():
            offset = _plan(item, (*path, key), copies, offset)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            offset = _plan(item, (*path, i), copies, offset)
    return offset


def _copied(item: _Copy, base: torch.Tensor) -> torch.Tensor:
    """Strides are kept where the items fill their span, as for channels_last."""
    source = item.source.resolve_conj().resolve_neg()
    size = source.numel() * source.dtype.itemsize
    flat = base[item.offset : item.offset + size].view(source.dtype)
    target = flat.as_strided(source.shape, source.stride()) if is_dense(source) else flat.view(source.shape)
    dtypes.as_plain(target).copy_(dtypes.as_plain(source), non_blocking=True)
    return target


def _rebuilt(value: Any, copies: Mapping[int, _Copy]) -> Any:
    if isinstance(value, torch.Tensor):
        staged = copies[id(value)].staged
        assert staged is not None
        return _as_dtensor(value, staged) if is_dtensor(value) else staged
    if isinstance(value, Mapping):
        kind: Callable[..., Any] = OrderedDict if isinstance(value, OrderedDict) else dict
        return kind((key, _rebuilt(item, copies)) for key, item in value.items())
    if isinstance(value, list):
        return [_rebuilt(item, copies) for item in value]
    if type(value) is tuple:
        return tuple(_rebuilt(item, copies) for item in value)
    return copy.deepcopy(value)


def _as_dtensor(like: Any, part: torch.Tensor) -> torch.Tensor:
    """A DTensor like another, whose local part lies on the CPU, whatever its mesh is of, as torch's own stagers do."""
    made: Any = like.detach()
    made._local_tensor = part
    staged: torch.Tensor = made
    return staged
