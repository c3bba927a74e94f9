"""One writer of a run in an object store, without a lock that a kernel holds."""

import threading
import time

import pytest
from support.object_schedules import value_of
from support.processes import until

from asyncckpt.catalog import lease
from asyncckpt.catalog.catalog import Catalog
from asyncckpt.catalog.lease import Lease
from asyncckpt.errors import ConflictError
from asyncckpt.format import names
from asyncckpt.storage.holding import MachineHolds
from asyncckpt.storage.object import ObjectStorage
from asyncckpt.testing.service import ServiceDriver

pytest.importorskip("obstore")


@pytest.fixture
def elsewhere(monkeypatch):
    """While it is called with True, this process takes itself for one of another machine."""
    real = MachineHolds.hold

    def set_(on: bool) -> None:
        monkeypatch.setattr(MachineHolds, "machine", "another" if on else "this")
        monkeypatch.setattr(
            MachineHolds, "hold", lambda self, name, **how: real(self, f"{name} there" if on else name, **how)
        )

    set_(False)
    return set_


@pytest.fixture
def quick(monkeypatch):
    """Leases of a second."""
    monkeypatch.setattr(lease, "LEASE", 1.0)
    monkeypatch.setattr(lease, "BEAT", 0.2)


def paused(owner: Lease) -> None:
    """It stands still, as a stopped process does."""
    owner._ended.set()
    owner._beating.join(10)


def test_one_at_a_time_and_then_the_next(storage: ObjectStorage):
    first = Lease.acquire(storage, 0)
    with pytest.raises(ConflictError, match="generation 1") as caught:
        Lease.acquire(storage, 0.1)
    assert caught.value.pid
    first.check()
    first.release()
    second = Lease.acquire(storage, 0)
    with pytest.raises(ConflictError, match="generation 2"):
        Lease.acquire(storage, 0)
    second.release()
    second.release()


def test_of_many_on_many_machines_one_wins(storage: ObjectStorage, monkeypatch):
    monkeypatch.setattr(MachineHolds, "hold", lambda self, name, **how: MachineHold(name))
    monkeypatch.setattr(MachineHolds, "machine", property(lambda self: threading.current_thread().name))
    start, got = threading.Barrier(6), []

    def want() -> None:
        start.wait(10)
        try:
            got.append(Lease.acquire(storage, 0.5))
        except ConflictError:
            pass

    threads = [threading.Thread(target=want) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(got) == 1
    got[0].release()


class MachineHold:
    def __init__(self, name: str) -> None:
        self.name = name

    def close(self) -> None:
        pass


def test_one_that_lives_elsewhere_is_never_taken_over(storage: ObjectStorage, elsewhere, quick):
    owner = Lease.acquire(storage, 0)
    elsewhere(True)
    with pytest.raises(ConflictError):
        Lease.acquire(storage, 1.8)
    owner.check()
    owner.release()
    Lease.acquire(storage, 0).release()


def test_one_that_is_silent_elsewhere_is_taken_over_and_finds_out(storage: ObjectStorage, elsewhere, quick):
    owner = Lease.acquire(storage, 0)
    paused(owner)
    elsewhere(True)
    begun = time.monotonic()
    other = Lease.acquire(storage, 30)
    assert time.monotonic() - begun >= 1.0
    with pytest.raises(ConflictError, match="taken over"):
        owner.check()
    owner.release()
    other.check()
    other.release()


def test_one_that_died_on_this_machine_is_not_waited_for(storage: ObjectStorage):
    owner = Lease.acquire(storage, 0)
    paused(owner)
    owner._hold.close()  # the kernel does that when a process dies
    begun = time.monotonic()
    other = Lease.acquire(storage, 30)
    assert time.monotonic() - begun < 10
    with pytest.raises(ConflictError):
        owner.check()
    other.release()


def test_a_beat_goes_on_after_the_store_could_not_be_reached(storage: ObjectStorage, quick, monkeypatch):
    owner = Lease.acquire(storage, 0)
    before = storage.read(names.LOCK, 4096)
    until(lambda: storage.read(names.LOCK, 4096) != before)
    owner.check()
    owner.release()


def test_who_was_taken_over_commits_deletes_and_sweeps_nothing(storage: ObjectStorage, elsewhere, quick, monkeypatch):
    """The new owner does the same step over again: what the earlier one thinks a leftover is its work."""
    monkeypatch.setattr(Lease, "_beat", lambda self: None)
    monkeypatch.setattr("asyncckpt.testing.service.open_storage", lambda *a, **k: storage)
    monkeypatch.setattr("asyncckpt.write.service.open_storage", lambda *a, **k: storage)
    with ServiceDriver(storage.url) as early:
        early.save(1, value_of(1))
        elsewhere(True)
        other = Lease.acquire(storage, 30)
        storage.put("step-00000002/0123456789ab/model.safetensors", b"of the new owner")
        for act in (
            lambda: early.save(2, value_of(2)),
            lambda: early.save(1, value_of(2), replace=True),
            lambda: early.delete(1),
            lambda: early.rewind(0),
        ):
            with pytest.raises(ConflictError):
                act()
    assert Catalog(storage).candidates() == [1]
    assert storage.list("step-00000002/0123456789ab") == ["model.safetensors"]
    other.check()
    other.release()
