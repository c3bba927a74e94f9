"""The background service: owns a run, takes snapshots one after the other, makes them durable, publishes, retires.

All methods run on the service's event loop; bytes and blocking calls run on its workers. Publishing, deleting and
rewinding exclude each other by one lock, so that what is being written can't be mistaken for a leftover.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import mmap
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from typing import Any

from asyncckpt.catalog.custody import Custody
from asyncckpt.catalog.ownership import Ownership, own
from asyncckpt.errors import (
    CheckpointError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    ConflictError,
    StorageError,
)
from asyncckpt.format import names
from asyncckpt.storage.base import Storage
from asyncckpt.storage.local import LocalStorage
from asyncckpt.storage.places import open_storage
from asyncckpt.storage.posix import Posix
from asyncckpt.write import messages as m
from asyncckpt.write.committing import Committer, guarded
from asyncckpt.write.mirror import Mirror
from asyncckpt.write.pipeline import DroppedSave, Save
from asyncckpt.write.retention import Retention
from asyncckpt.write.workers import Workers

log = logging.getLogger("asyncckpt")
_PROGRESS_STEP = 64 << 20
_TAKEOVER = 90.0
"""Seconds for which a mirror in an object store is waited for before it counts as owned by another."""
_LAST_ADVICE = 30.0
"""Seconds that a service which is to end still waits for the trainer to say what may go."""


class Service:
    """`reply` is called on the loop, and must not block."""

    def __init__(self, reply: Callable[[m.Reply], None], *, workers: Workers, posix: Posix | None = None) -> None:
        self._reply = reply
        self._workers = workers
        self._posix = posix
        self._arenas: dict[int, memoryview] = {}
        self._saves: dict[int, Save] = {}
        self._queue: asyncio.Queue[Save | None] = asyncio.Queue()
        self._reported: dict[int, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._waits: set[asyncio.Task[None]] = set()
        """On whom the end does not wait."""
        self._custody_lock = asyncio.Lock()
        self._give_up = threading.Event()
        self._retention: Retention | None = None
        self._mirror: Mirror | None = None
        self._opened = False
        self._rank = 0
        self._failure: Exception | None = None
        self._ended = asyncio.Event()

    # What comes in

    def receive(self, message: m.Request, memory: memoryview | int | None = None) -> None:
        """Take one message; `memory` is what comes along with Share: a file descriptor, or the memory itself.

        A message that can't be taken (an arena that can't be mapped, say) ends the service, so that the trainer hears
        of it and starts another.
        """
        try:
            self._take(message, memory)
        except Exception as error:
            self._failure = self._failure or error
            self._ended.set()

    def _take(self, message: m.Request, memory: memoryview | int | None) -> None:
        match message:
            case m.Open():
                self._opened = True
                self._spawn(self._run(message))
            case m.Share():
                assert memory is not None
                self._arenas[message.arena] = memory if isinstance(memory, memoryview) else _map(memory, message.size)
            case m.Forget():
                self._arenas.pop(message.arena, None)
            case m.Begin():
                save = self._saves[message.save] = Save(message, self._arenas[message.arena])
                self._queue.put_nowait(save)
            case m.Staged():
                if (save := self._saves.get(message.save)) is not None:  # type: ignore[assignment]
                    save.hashed.update({(chunk.part, chunk.start): chunk for chunk in message.hashed})
                    save.staged = message.upto
                    save.touch()
            case m.Seal():
                if (save := self._saves.get(message.save)) is not None:  # type: ignore[assignment]
                    save.seal = message
                    save.staged = message.offset + message.size
                    save.touch()
            case m.Drop():
                self._drop(message)
            case m.Look():
                if (save := self._saves.get(message.save)) is not None:  # type: ignore[assignment]
                    save.committed = save.committed or message.committed
                    save.touch()
            case m.Hurry():
                self._workers.hurry = message.on
            case m.Trust():
                self._spawn(self._trust(message.step))
            case m.Reserve():
                self._custody.active.add(f"{names.step_name(message.step)}/{message.attempt}")
                self._reply(m.Done(message.call))
            case m.Release():
                self._release(message.step, message.attempt)
            case m.Delete() | m.RewindTo():
                self._spawn(self._command(message))
            case m.AwaitMirror():
                self._spawn(self._await_mirror(message), self._waits)
            case m.Noted():
                if self._mirror is not None:
                    self._mirror.noted()
            case m.Advice():
                if self._retention is not None:
                    self._retention.answer(message)
            case m.Close():
                self._queue.put_nowait(None)

    def orphaned(self) -> None:
        """The trainer is gone: finish every snapshot that is whole, and end."""
        self._give_up.set()
        if self._retention is not None:
            self._retention.give_up()
        self._workers.hurry = True
        for save in self._saves.values():
            save.orphaned = True
            save.dropped = save.dropped or save.seal is None
            save.touch()
        self._queue.put_nowait(None)
        if not self._opened:
            self._ended.set()

    async def finished(self) -> None:
        """Wait for the end: after Close, after `orphaned`, or refused.

        Raises:
            Exception: what a message that could not be taken, or the work itself, has raised.
        """
        await self._ended.wait()
        self._workers.close()
        if self._failure is not None:
            raise self._failure

    def _drop(self, message: m.Drop) -> None:
        save = self._saves.get(message.save)
        if save is None and not message.queued_only:  # it was never announced, or has ended
            self._reply(m.Dropped(message.save))
        if save is None or (message.queued_only and save.started):
            return
        save.dropped = True
        save.touch()
        if not save.started:
            self._end(save, m.Dropped(save.begin.save))

    def _spawn(self, work: Coroutine[Any, Any, None], among: set[asyncio.Task[None]] | None = None) -> None:
        tasks = self._tasks if among is None else among
        task = asyncio.create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    def _end(self, save: Save, reply: m.Reply) -> None:
        self._saves.pop(save.begin.save, None)
        if save.begin.member is not None:
            self._release(save.begin.step, save.begin.member.attempt)
        self._reported.pop(save.begin.save, None)
        save.memory = memoryview(b"")
        self._reply(reply)

    # The run

    async def _run(self, open_: m.Open) -> None:
        try:
            await self._own_and_serve(open_)
        except Exception as error:
            self._failure = self._failure or error
        finally:
            self._ended.set()

    async def _own_and_serve(self, open_: m.Open) -> None:
        try:
            storage = await self._workers.run(self._open, open_)
        except (CheckpointError, OSError, ValueError) as error:
            self._reply(m.Refused(m.Fault.of(error)))
            return
        self._rank, self._storage = open_.rank, storage
        self._committer = Committer(storage, self._workers, open_, self._custody_of, self._progress, self._ready)
        if open_.rank:
            self._reply(m.Opened(os.getpid()))
            await self._serve()
            return
        try:
            lock: Ownership = await self._workers.run(own, storage, open_.lock_timeout, self._give_up)
        except (CheckpointError, OSError) as error:
            self._reply(m.Refused(m.Fault.of(error)))
            return
        try:
            try:
                self._custody = await self._workers.run(Custody, storage, open_.keep, lock.check)
                if isinstance(storage, LocalStorage):
                    storage.start_recycling()
                    self._custody.recycle = storage.recycle
                if open_.mirror is not None:
                    self._mirror = await self._open_mirror(open_.mirror, storage, open_.direct)
            except (CheckpointError, OSError) as error:
                self._reply(m.Refused(m.Fault.of(error)))
                return
            self._retention = Retention(self._custody_of, open_.asks, self._workers, self._reply)
            if self._give_up.is_set():
                self._retention.give_up()
            self._reply(m.Opened(os.getpid()))
            if self._mirror is not None:
                self._mirror.start()
            async with self._custody_of() as custody:  # commands may come already
                await guarded("clearing leftovers", self._workers.run(custody.sweep))
            await self._serve()
        except BaseException:
            if self._mirror is not None:
                await self._mirror.close()
            raise
        finally:
            if isinstance(storage, LocalStorage):
                await self._workers.run(storage.end_recycling)
            await self._workers.run(lock.release)  # the mirror only reads here: who comes next need not wait for it
        if self._mirror is not None:
            await self._mirror.finish(lambda: self._is_free(storage))

    async def _open_mirror(self, to: m.MirrorTo, storage: Storage, direct: bool) -> Mirror:
        """The mirror, not started yet; sequence numbers go on from those that it has.

        Raises:
            StorageError: it can't be read, and there is nothing here.
        """
        target = open_storage(to.url, to.options, posix=self._posix, direct=direct)
        own_target = partial(own, target, 0.0 if isinstance(target, LocalStorage) else _TAKEOVER)
        catalog, landed = self._custody.catalog, lambda: self._mirror_landed(to.required)
        mirror = Mirror(to, catalog, target, own_target, self._workers.nice, self._reply, landed)
        try:
            self._custody.go_on_from(await mirror.look())
        except (CheckpointError, OSError) as error:
            if not self._custody.sequence:
                await mirror.close()
                raise StorageError(
                    f"{storage.url} is empty, and whether its mirror has checkpoints can't be told: {error}. Start "
                    "when it can be read, or without mirror= if this run is a new one.",
                    retryable=True,
                ) from error
            log.warning("the mirror can't be read; going on from what is in %s: %s", storage.url, error)
        mirror.known = self._custody.sequence
        if to.required:
            self._custody.spared = mirror.lacks
        return mirror

    def _mirror_landed(self, required: bool) -> None:
        """A step need not stay for the mirror any more, and is not read by it."""
        if (required or self._custody.postponed) and self._retention is not None:
            self._spawn(guarded("retention", self._retention.again()))

    def _is_free(self, storage: Storage) -> bool:
        """Whether no other service owns the run, which this one has given up."""
        try:
            own(storage, 0.0).release()
        except ConflictError:
            return False
        return True

    async def _await_mirror(self, message: m.AwaitMirror) -> None:
        fault = None
        try:
            if self._mirror is not None:
                await self._mirror.drained(message.save)
        except Exception as error:
            fault = m.Fault.of(error)
        self._reply(m.Done(message.call, fault))

    def _open(self, open_: m.Open) -> Storage:
        return open_storage(open_.root, open_.options, posix=self._posix, direct=open_.direct)

    async def _serve(self) -> None:
        """Write what comes, until Close."""
        while (save := await self._queue.get()) is not None:
            if not save.dropped:
                save.started = True
                await self._write(save)
            elif save.begin.save in self._saves:
                self._end(save, m.Dropped(save.begin.save))
        self._committer.close()
        if self._retention is not None:
            asyncio.get_running_loop().call_later(_LAST_ADVICE, self._retention.give_up)
        while others := self._tasks - {asyncio.current_task()}:
            await asyncio.wait(others)

    @contextlib.asynccontextmanager
    async def _custody_of(self) -> AsyncIterator[Custody]:
        async with self._custody_lock:
            yield self._custody

    # One save

    async def _write(self, save: Save) -> None:
        step, member = save.begin.step, save.begin.member
        try:
            if member is not None and member.rank:
                self._end(save, await self._committer.share(save, member))
                return
            manifest, replaced, reply = await self._committer.commit(save)
        except DroppedSave:
            self._end(save, m.Dropped(save.begin.save))
        except FileExistsError:
            exists = CheckpointExistsError(f"step {step} is committed already; give overwrite=True to replace it")
            self._end(save, m.Failed(save.begin.save, m.Fault.of(exists)))
        except Exception as error:
            self._end(save, m.Failed(save.begin.save, m.Fault.of(error)))
        else:
            if self._mirror is not None:
                self._mirror.committed(manifest, save.begin.save)
            self._end(save, reply)
            assert self._retention is not None
            self._spawn(guarded("retention", self._retention.after_commit(manifest, replaced)))

    def _ready(self, save: Save) -> None:
        self._reply(m.Ready(save.begin.save))

    def _release(self, step: int, attempt: str) -> None:
        """A save of several ranks has ended here, or will not begin: what it has left is a leftover now."""
        folder = f"{names.step_name(step)}/{attempt}"
        if self._rank == 0 and folder in self._custody.active:
            self._custody.active.discard(folder)
            self._spawn(guarded("clearing a failed attempt", self._sweep_step(step)))

    async def _sweep_step(self, step: int) -> None:
        async with self._custody_of() as custody:
            await self._workers.run(custody.sweep_step, step)

    def _progress(self, save: Save) -> None:
        number = save.begin.save
        if save.written - self._reported.get(number, 0) >= _PROGRESS_STEP:
            self._reported[number] = save.written
            self._reply(m.Progress(number, save.written))

    # Commands

    async def _trust(self, step: int) -> None:
        async with self._custody_of() as custody:
            await guarded("trusting what was restored", self._workers.run(custody.trust, step))

    async def _command(self, message: m.Delete | m.RewindTo) -> None:
        try:
            async with self._custody_of() as custody:
                if isinstance(message, m.Delete):
                    await self._delete(custody, message.step)
                else:
                    await self._workers.run(custody.rewind, message.step)
            if self._mirror is not None:
                self._mirror.noted()
        except (CheckpointError, OSError) as error:
            self._reply(m.Done(message.call, m.Fault.of(error)))
        else:
            self._reply(m.Done(message.call))

    async def _delete(self, custody: Custody, step: int) -> None:
        there = await self._workers.run(custody.catalog.exists, step)
        if there:
            await self._workers.run(custody.delete, step)
        if self._mirror is not None:
            there = await self._mirror.delete(step) or there
        if not there:
            raise CheckpointNotFoundError(f"no checkpoint of step {step} in {self._storage.url}")


def _map(fd: int, size: int) -> memoryview:
    try:
        return memoryview(mmap.mmap(fd, size))
    finally:
        os.close(fd)
