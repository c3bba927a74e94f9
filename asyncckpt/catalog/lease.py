"""Who may write a run in an object store, where no kernel holds a lock: whom the owner object names.

The object holds a generation, which grows by one with every owner, and a token of the owner's own. It is changed by
conditional writes only, so that of two that want the run one gets it. The owner writes a new beat into it every `BEAT`
seconds; whoever waits takes the run over when it has seen no change for `LEASE` seconds of its own clock, and never by
comparing the clocks of two machines. On the machine of the owner a kernel lock tells at once that it is dead.

A clock can only decide when to take over, not who is right: an owner that stood still for so long, or lost its network,
finds another generation before it commits, deletes or rewinds, and gets `ConflictError`. Between that look and the
commit lies one request. A process that stands still just there, for longer than `LEASE`, may yet commit one checkpoint;
it is whole, and takes the place of nobody's.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time

import msgspec

from asyncckpt.errors import CheckpointError, ConflictError, StorageError
from asyncckpt.format import names
from asyncckpt.storage.holding import MachineHold
from asyncckpt.storage.object import ObjectStorage, Version

log = logging.getLogger("asyncckpt")

LEASE = 45.0
"""Seconds without a beat after which an owner may be taken over."""
BEAT = 15.0
_TIMEOUT = 10.0
"""Seconds after which a request for the owner object is given up: a beat must not come too late by waiting."""
_LIMIT = 4096
_LONGEST_POLL = 1.0


class Owner(msgspec.Struct, frozen=True, kw_only=True):
    """The owner object. All but `generation` and `token` is for the sake of waiting, and of people."""

    generation: int
    token: str
    beat: int = 0
    free: bool = False
    pid: int = 0
    host: str = ""
    machine: str = ""


class Lease:
    """The run, owned by this process until `release`, or until somebody takes it over."""

    def __init__(self, storage: ObjectStorage, owner: Owner, version: Version, hold: MachineHold) -> None:
        self._storage, self._owner, self._version, self._hold = storage, owner, version, hold
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._lost = False
        self._beating = threading.Thread(target=self._beat, name="asyncckpt-lease", daemon=True)
        self._beating.start()

    @classmethod
    def acquire(cls, storage: ObjectStorage, timeout: float, cancelled: threading.Event | None = None) -> Lease:
        """Wait up to `timeout` seconds for the run.

        Raises:
            ConflictError: another writer still owns it, or may.
            StorageError: the store can't be reached, or refuses.
        """
        waiting = _Waiting(storage.impatient(_TIMEOUT), timeout, cancelled)
        hold = waiting.for_machine()
        try:
            return waiting.for_run(hold)
        except BaseException:
            hold.close()
            raise

    def check(self) -> None:
        """
        Raises:
            ConflictError: somebody has taken the run over.
            StorageError: that can't be found out.
        """
        there = None if self._lost else _look(self._storage)
        if there is not None and there[0].token == self._owner.token:
            return
        self._lost = True
        who = "nobody" if there is None else _name(there[0])
        raise ConflictError(
            f"{self._storage.url} was taken over from this writer (generation {self._owner.generation}), and belongs "
            f"to {who} now. That happens to a writer that is not heard of for {LEASE:g} s. Nothing was changed.",
            pid=None if there is None else there[0].pid,
        )

    def release(self) -> None:
        """Let the next owner have it at once. Never raises: what can't be told, the next one finds out by waiting."""
        self._ended.set()
        with self._lock:
            if not self._lost:
                try:
                    self._write(free=True)
                except CheckpointError as error:
                    log.warning("giving up the run: %s", error)
                self._lost = True
        self._hold.close()

    def _beat(self) -> None:
        told = False
        while not self._ended.wait(BEAT):
            try:
                with self._lock:
                    if self._lost or not self._write(beat=self._owner.beat + 1):
                        return
                told = False
            except CheckpointError as error:
                if not told:
                    log.warning("%s; after %g s of that another writer may take the run over", error, LEASE)
                told = True

    def _write(self, **changes: object) -> bool:
        owner = msgspec.structs.replace(self._owner, **changes)
        version = self._storage.put_if(names.LOCK, msgspec.json.encode(owner), self._version)
        if version is None:
            self._lost = True
            log.error("%s was taken over by another writer", self._storage.url)
            return False
        self._owner, self._version = owner, version
        return True


class _Waiting:
    """Somebody waits for a run."""

    def __init__(self, storage: ObjectStorage, timeout: float, cancelled: threading.Event | None) -> None:
        self._storage, self._timeout, self._cancelled = storage, timeout, cancelled
        self._deadline = time.monotonic() + timeout
        self._poll = 0.05

    def for_machine(self) -> MachineHold:
        """The lock that tells other processes of this machine that this one lives."""
        while True:
            hold = self._storage.holds.hold(names.LOCK, exclusive=True, wait=False)
            if hold is not None:
                return hold
            there = _look(self._storage)
            self._rest(None if there is None else there[0])

    def for_run(self, hold: MachineHold) -> Lease:
        machine = self._storage.holds.machine
        seen, since = None, time.monotonic()
        while True:
            there = _look(self._storage)
            owner, version = (None, None) if there is None else there
            if version != seen:
                seen, since = version, time.monotonic()
            dead = owner is not None and owner.machine == machine  # for we have its lock
            if owner is None or owner.free or dead or time.monotonic() - since >= LEASE:
                mine = Owner(
                    generation=1 if owner is None else owner.generation + 1,
                    token=secrets.token_hex(8),
                    pid=os.getpid(),
                    host=socket.gethostname(),
                    machine=machine,
                )
                taken = self._storage.put_if(names.LOCK, msgspec.json.encode(mine), version)
                if taken is not None:
                    return Lease(self._storage, mine, taken, hold)
                owner = None  # another was quicker
            self._rest(owner)

    def _rest(self, owner: Owner | None) -> None:
        if time.monotonic() >= self._deadline or (self._cancelled is not None and self._cancelled.is_set()):
            who = "another process" if owner is None else _name(owner)
            raise ConflictError(
                f"{self._storage.url} is being written by {who}, still after {self._timeout:g} s. Stop it, give this "
                "run a place of its own, or raise lock_timeout: that a writer elsewhere is dead is known after "
                f"{LEASE:g} s.",
                pid=None if owner is None else owner.pid,
            )
        time.sleep(min(self._poll, max(0.0, self._deadline - time.monotonic())))
        self._poll = min(1.5 * self._poll, _LONGEST_POLL)


def _look(storage: ObjectStorage) -> tuple[Owner, Version] | None:
    there = storage.look(names.LOCK, _LIMIT)
    if there is None:
        return None
    try:
        return msgspec.json.decode(there[0], type=Owner), there[1]
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise StorageError(
            f"{storage.path(names.LOCK)} says nothing of an owner ({error}). If no writer is at work there, remove it."
        ) from None


def _name(owner: Owner) -> str:
    return f"process {owner.pid} of {owner.host or 'an unknown machine'} (generation {owner.generation})"
