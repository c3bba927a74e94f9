"""One snapshot: described state -> arena.

What may change before the next optimizer step is copied before `take` returns, the rest
behind the fence, unless everything is to be copied at once.
"""

from __future__ import annotations

import logging
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from asyncckpt.errors import TornSnapshotError
from asyncckpt.snapshot import dtypes, fence
from asyncckpt.snapshot.arena import Arena
from asyncckpt.snapshot.copy import CopyJob, Piece
from asyncckpt.snapshot.cuda import DeviceCopies, pin
from asyncckpt.snapshot.describe import Describer, Description, Part
from asyncckpt.snapshot.hashed import Home, Notes
from asyncckpt.snapshot.known import Comparison
from asyncckpt.snapshot.plan import PartPlan, Source
from asyncckpt.snapshot.program import Program, program_of
from asyncckpt.snapshot.torn import Look, Watched
from asyncckpt.write.messages import Hashed, Known
from asyncckpt.write.workers import DaemonPool

log = logging.getLogger("asyncckpt")
MAX_THREADS = 8


@dataclass
class _Split:
    """Which sources of a part are copied before `save` returns, and which behind the fence."""

    owned: fence.Owned | None
    torn: int
    eager: list[int]
    late: list[int]
    watched: Watched
    programs: weakref.WeakKeyDictionary[Arena, Program] = field(default_factory=weakref.WeakKeyDictionary)


class Snapshot:
    """A snapshot being taken. `ended` is called once: with None when it is whole and consistent, else with an error."""

    def __init__(
        self,
        owner: Snapshotter,
        params: frozenset[int],
        looks: list[Look],
        device_looks: list[Look],
        device: DeviceCopies,
        staged: Callable[[int], None],
        ended: Callable[[BaseException | None], None],
    ) -> None:
        self.params = params
        self._owner = owner
        self._looks, self._device_looks = looks, device_looks
        self._device = device
        self._staged, self._ended = staged, ended
        self._torn: set[str] = set()
        self._sealed = threading.Event()
        self._job: CopyJob | None = None
        self._size = 0

    def start(self, job_pieces: list[Piece], end: int, arena: Arena) -> CopyJob:
        self._size = end
        staged = (lambda upto: None) if self._device else self._staged
        self._job = CopyJob(job_pieces, end, arena, staged, self._host_done)
        return self._job

    def fence(self) -> None:
        """Return when a change can no longer reach the snapshot."""
        begun = time.perf_counter()
        if self._device:
            self._device.hold_back()
            self._check(self._device_looks)
        if self._job is not None and not self._job.over:
            self._job.work()
            self._job.wait()
        self._owner.fenced += time.perf_counter() - begun

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it has ended, well or not."""
        return self._sealed.wait(timeout)

    def _host_done(self, error: BaseException | None) -> None:
        try:
            self._check(self._looks)
        except Exception as failure:
            error = error or failure
        if self._device:
            self._owner.pool.submit(self._device_done, error)
        else:
            self._end(error)

    def _device_done(self, error: BaseException | None) -> None:
        try:
            self._device.wait()
            self._check(self._device_looks)
            if error is None:
                self._staged(self._size)
        except Exception as failure:
            error = error or failure
        self._end(error)

    def _check(self, looks: list[Look]) -> None:
        for look in looks:
            self._torn.update(look.changed())
        looks.clear()

    def _end(self, error: BaseException | None) -> None:
        fence.land(self)
        if self._torn:
            torn = self._owner.tore(tuple(sorted(self._torn)))
            torn.__cause__, error = error, torn
        try:
            self._ended(error)
        finally:
            self._sealed.set()


class Snapshotter:
    """Takes the snapshots of one Checkpointer. `overlap_parts` opts parts in whose owner calls `fence()` itself.

    `exports` are the parts of which there is to be one more, and the dtypes of that: see `Describer`.
    """

    def __init__(self, overlap_parts: Collection[str] = (), exports: Mapping[str, str] | None = None) -> None:
        self.overlap_parts = frozenset(overlap_parts)
        self.fenced = 0.0
        """Seconds that optimizer steps waited at the fence."""
        self.pool = DaemonPool(1, "asyncckpt-copy")
        self._helpers: DaemonPool | None = None
        self._helper_count = 0
        self._describer = Describer(exports or {})
        self._splits: weakref.WeakKeyDictionary[Part, _Split] = weakref.WeakKeyDictionary()
        self._notes: weakref.WeakKeyDictionary[Arena, Notes] = weakref.WeakKeyDictionary()
        self._owned: fence.Owned | None = None
        self._torn: set[str] = set()
        self._warned = False
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._loading: dict[int, tuple[weakref.ref[Any], Any]] = {}

    def describe(self, state: Mapping[str, Any], parts: Collection[str] | None = None) -> Description:
        """What a snapshot of `state`, or of some of its parts, will be: see `Describer.describe`."""
        return self._describer.describe(state, parts)

    def take(
        self,
        what: Description,
        arena: Arena,
        overlap: bool,
        staged: Callable[[int, list[Hashed]], None],
        ended: Callable[[BaseException | None], None],
        known: Mapping[str, Known] | None = None,
    ) -> Snapshot:
        """Start the copies. `staged` and `ended` may be called from other threads, and before this returns.

        With how far the arena is what it will stay, `staged` is told the chunks that were hashed on the way; those of
        `known` parts that are still what they were are not copied, where everything is in CPU memory.
        """
        owned = self._owned_by(what.optimizers) if overlap else None
        device = DeviceCopies(self._streams)
        notes = self._notes.setdefault(arena, Notes())
        hashed = notes.renew()
        now = [
            _put(arena, what.trees_offset, what.trees),
            *(_put(arena, base, what.parts[name].plan.image.header) for name, base, size in what.spans if size),
        ]
        later: list[Piece] = []
        looks: list[Look] = []
        device_looks: list[Look] = []
        on_device: list[tuple[PartPlan, int, list[int]]] = []
        splits = {
            name: self._split(name, what.exports.get(name, name), what.parts[name], owned)
            for name, _, size in what.spans
            if size
        }
        at_once = arena.ready or not any(split.late for split in splits.values())
        on_gpus = {
            name: {i for i, source in enumerate(what.parts[name].plan.sources) if source.data.device.type == "cuda"}
            for name in splits
        }
        if known is None or not arena.ready or any(on_gpus.values()):
            known = {}
        for name, base, size in what.spans:
            if not size:
                continue
            part, split, on_gpu = what.parts[name], splits[name], on_gpus[name]
            plan = part.plan
            if on_gpu:
                pin(arena)
                device.enqueue(plan, [i for i in split.eager if i in on_gpu], base, arena)
                on_device.append((plan, base, [i for i in split.late if i in on_gpu]))
            if not at_once:
                detached = _detach_eager(plan, split.eager)
                at_once = detached is None
                plan = detached or plan
            comparison = Comparison(known[name]) if name in known else None
            home = Home(name, plan.image, base, arena.memory, notes)
            program = self._program(part, plan, split, home, arena, comparison)
            now.extend(program.eager)
            later.extend(program.late)
            if split.late:
                (device_looks if on_gpu else looks).append(split.watched.look())
        device.mark()
        device.hold_back()
        for plan, base, which in on_device:
            device.enqueue(plan, which, base, arena)
        device.mark()
        overlapped = bool(later) or any(which for _, _, which in on_device)

        def tell(upto: int) -> None:
            staged(upto, [hashed.popleft() for _ in range(len(hashed))])

        snapshot = Snapshot(self, owned.params if owned else frozenset(), looks, device_looks, device, tell, ended)
        end = what.trees_offset + len(what.trees)
        if not overlapped:
            self._all_hands(snapshot.start(now + later, end, arena))
            return snapshot
        self._guard_loading(what)
        if at_once:
            eager = CopyJob(now, end, arena, lambda upto: None, lambda error: None)
            self._all_hands(eager)
            if eager.error is not None:
                device.wait()
                raise eager.error
            now = []
        fence.take_off(snapshot)
        job = snapshot.start(now + later, end, arena)
        try:
            self.pool.submit(job.work)
            return snapshot
        except BaseException as error:
            job.abandon(error)
            raise

    def _owned_by(self, optimizers: list[Optimizer]) -> fence.Owned:
        if self._owned is None or not self._owned.holds(optimizers):
            self._owned = fence.Owned(optimizers)
        return self._owned

    def _split(self, name: str, origin: str, part: Part, owned: fence.Owned | None) -> _Split:
        """`origin` is the part of the state that `name` stands for."""
        split = self._splits.get(part)
        if split is not None and split.owned is owned and split.torn == len(self._torn):
            return split
        eager, late, watched_names, watched = [], [], [], []
        for i, (entry, source) in enumerate(zip(part.plan.image.entries, part.plan.sources, strict=True)):
            full = f"{name}/{entry.name}"
            if owned is None or full in self._torn or not self._may_wait(origin, source, owned):
                eager.append(i)
            else:
                late.append(i)
                watched_names += [full] * len(source.live)
                watched += source.live
        split = _Split(owned, len(self._torn), eager, late, Watched(watched_names, watched))
        self._splits[part] = split
        return split

    def _may_wait(self, name: str, source: Source, owned: fence.Owned) -> bool:
        if name in self.overlap_parts:
            return not any(t.is_inference() for t in source.live)
        return all(owned.covers(t) for t in source.live)

    def _program(
        self, part: Part, plan: PartPlan, split: _Split, home: Home, arena: Arena, comparison: Comparison | None
    ) -> Program:
        """What copies a part; kept while nothing of it changes."""
        program = split.programs.get(arena)
        if program is None or plan is not part.plan or not program.renew(home, comparison):
            program = program_of(plan, split.eager, split.late, home, arena, comparison)
            if plan is part.plan:
                split.programs[arena] = program
        return program

    def _all_hands(self, job: CopyJob) -> None:
        """Run a job on all of torch's threads, this one among them, and return when it is over."""
        count = min(torch.get_num_threads(), MAX_THREADS) - 1
        if count > self._helper_count:
            if self._helpers is not None:
                self._helpers.shutdown()
            self._helpers, self._helper_count = DaemonPool(count, "asyncckpt-copy"), count
        try:
            for _ in range(count):
                assert self._helpers is not None
                self._helpers.submit(job.work)
            job.work()
            job.wait()
        except BaseException as error:  # a signal's handler may raise anywhere, and the arena is another's then
            job.abandon(error)
            raise

    def _guard_loading(self, what: Description) -> None:
        for part in what.parts.values():
            value = part.value() if part.value is not None else None
            if value is not None and id(value) not in self._loading:
                hook = fence.guard_loading(value)
                if hook is not None:
                    self._loading[id(value)] = (weakref.ref(value, partial(_unhook, self._loading, id(value))), hook)

    # After

    def tore(self, tensors: tuple[str, ...]) -> TornSnapshotError:
        """Note tensors that changed behind the fence's back: they are copied before `save` returns from now on."""
        self._torn.update(tensors)
        few = ", ".join(tensors[:5]) + (f" and {len(tensors) - 5} more" if len(tensors) > 5 else "")
        message = (
            f"{few} changed while being copied in the background, outside of optimizer.step(); this save was not "
            "committed. They are copied before save() returns from now on. Call fence() before such an update to "
            "overlap them, or use overlap=False."
        )
        if not self._warned:
            self._warned = True
            with suppress(RuntimeWarning):  # where warnings are errors: the handle's error tells, too
                warnings.warn(message, RuntimeWarning, stacklevel=2)
        return TornSnapshotError(message, tensors=tensors)

    def close(self) -> None:
        """Let go of the state, and take all hooks off it."""
        self._describer.forget()
        self._owned = None
        for _, hook in self._loading.values():
            hook.remove()
        self._loading.clear()
        self.pool.shutdown()
        if self._helpers is not None:
            self._helpers.shutdown()


def _detach_eager(plan: PartPlan, eager: list[int]) -> PartPlan | None:
    """The plan with copies in place of the eager sources, for an arena whose pages are yet to be taken.

    None: there is no memory for these copies.
    """
    sources = list(plan.sources)
    for i in eager:
        source = sources[i]
        if source.data.device.type != "cuda":
            try:
                if source.cast is None:
                    data = dtypes.as_plain(source.data).clone(memory_format=torch.preserve_format)
                else:
                    data = source.data.to(source.cast)  # always a copy: a cast is to another dtype
            except RuntimeError as error:
                log.debug("copied into the snapshot itself: %s", error)
                return None
            sources[i] = Source(data, source.live, source.contiguous)
    return PartPlan(plan.specs, sources, plan.image)


def _put(arena: Arena, offset: int, data: bytes) -> Piece:
    """The piece that is these bytes."""

    def copy() -> None:
        arena.memory[offset : offset + len(data)] = data

    return Piece(offset, len(data), copy)


def _unhook(loading: dict[int, Any], key: int, value: object) -> None:
    loading.pop(key, None)
