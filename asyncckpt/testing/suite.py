"""The conformance suite of the contract in `asyncckpt.storage.base`. Needs pytest.

class TestMyStorage(StorageSuite):
    @pytest.fixture
    def storage(self, tmp_path):
        return MyStorage(tmp_path)      # new, empty, and of the life of one test
"""

from __future__ import annotations

import mmap
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from asyncckpt.catalog.custody import Custody
from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.format import names
from asyncckpt.storage.base import Storage

BLOCK = 4096
STEP = "step-00000007"
FOLDER = f"{STEP}/0123456789ab"
FILE = f"{FOLDER}/model.safetensors"
RECORD = f"{FOLDER}/{names.RECORD}"
MANIFEST = f"{STEP}/{names.MANIFEST}"


class StorageSuite:
    """Subclass it, and give it a fixture `storage`."""

    # Looking

    def test_it_has_a_name_for_people(self, storage: Storage) -> None:
        assert isinstance(storage.url, str)
        assert storage.url

    def test_nothing_is_there_at_first(self, storage: Storage) -> None:
        assert storage.list("") == []
        assert storage.list(STEP) == []
        assert storage.list(FOLDER) == []

    def test_what_is_not_there_is_file_not_found(self, storage: Storage) -> None:
        storage.begin(FOLDER)
        with pytest.raises(FileNotFoundError):
            storage.read(RECORD, 100)
        with pytest.raises(FileNotFoundError):
            storage.open(FILE)
        with pytest.raises(FileNotFoundError):
            storage.read("step-00000099/manifest.json", 100)

    def test_a_list_names_what_is_directly_below(self, storage: Storage) -> None:
        storage.begin(FOLDER)
        storage.put(RECORD, b"{}")
        write(storage, FILE, b"x")
        storage.publish(MANIFEST, b"{}", replace=False)
        assert set(storage.list("")) == {STEP}
        assert set(storage.list(STEP)) == {"0123456789ab", names.MANIFEST}
        assert set(storage.list(FOLDER)) == {"model.safetensors", names.RECORD}

    def test_room_is_a_number_or_unknown(self, storage: Storage) -> None:
        free = storage.free_bytes()
        assert free is None or free > 0

    # Small objects

    @pytest.mark.parametrize("size", [0, 1, BLOCK, 3 * BLOCK + 5])
    def test_put_and_read(self, storage: Storage, size: int) -> None:
        storage.begin(FOLDER)
        storage.put(RECORD, pattern(size))
        assert storage.read(RECORD, size) == pattern(size)

    def test_an_object_above_the_limit_is_corrupt(self, storage: Storage) -> None:
        storage.begin(FOLDER)
        storage.put(RECORD, pattern(101))
        with pytest.raises(CorruptCheckpointError):
            storage.read(RECORD, 100)

    # Files

    @pytest.mark.parametrize("size", [1, 511, BLOCK, BLOCK + 1, 5 * BLOCK, 5 * BLOCK + 4095])
    def test_a_file_holds_what_was_written(self, storage: Storage, size: int) -> None:
        storage.begin(FOLDER)
        write(storage, FILE, pattern(size))
        assert contents(storage, FILE) == pattern(size)

    def test_pieces_may_come_in_any_order_and_from_several_threads(self, storage: Storage) -> None:
        data = pattern(64 * BLOCK + 17)
        storage.begin(FOLDER)
        write(storage, FILE, data, piece=2 * BLOCK, threads=4)
        assert contents(storage, FILE) == data

    def test_a_read_ends_with_the_file(self, storage: Storage) -> None:
        data = pattern(2 * BLOCK + 10)
        storage.begin(FOLDER)
        write(storage, FILE, data)
        file = storage.open(FILE)
        try:
            assert file.size == len(data)
            buffer = aligned(2 * BLOCK)
            assert file.read_into(BLOCK, buffer) == BLOCK + 10
            assert buffer[: BLOCK + 10] == data[BLOCK:]
            assert file.read_into(4 * BLOCK, buffer) == 0
        finally:
            file.close()

    def test_abort_may_come_at_any_time_and_never_raises(self, storage: Storage) -> None:
        storage.begin(FOLDER)
        file = storage.create(FILE, 10)
        file.abort()
        file.abort()
        other = storage.create(f"{FOLDER}/other.safetensors", 0)
        other.finish()
        other.abort()

    @pytest.mark.parametrize("reserved", [0, BLOCK, 9 * BLOCK])
    def test_a_file_may_end_elsewhere_than_was_thought(self, storage: Storage, reserved: int) -> None:
        storage.begin(FOLDER)
        data = aligned(3 * BLOCK)
        data[:] = pattern(3 * BLOCK)
        file = storage.create(FILE, reserved)
        file.write_at(0, data[: 2 * BLOCK])
        file.write_at(2 * BLOCK, data[2 * BLOCK : 2 * BLOCK + 10])
        file.finish(2 * BLOCK + 10)
        assert contents(storage, FILE) == data[: 2 * BLOCK + 10]

    def test_a_file_that_is_shared_outlives_the_others(self, storage: Storage) -> None:
        coded = names.coded_file("model", "0123456789ab", names.STILL)
        other = "step-00000008/ba9876543210"
        for folder in (FOLDER, other):
            storage.begin(folder)
        write(storage, f"{FOLDER}/{coded}", b"bytes of both")
        storage.share(f"{FOLDER}/{coded}", f"{other}/{coded}")
        storage.settle(other)
        with pytest.raises(FileExistsError):
            storage.share(f"{FOLDER}/{coded}", f"{other}/{coded}")
        storage.remove_folder(FOLDER)
        assert contents(storage, f"{other}/{coded}") == b"bytes of both"
        with pytest.raises(FileNotFoundError):
            storage.share(f"{FOLDER}/{coded}", f"{other}/model.safetensors")
        storage.remove_folder(other)
        assert storage.list(other) == []

    def test_two_attempts_at_one_step_do_not_meet(self, storage: Storage) -> None:
        for attempt, data in (("aaaaaaaaaaaa", b"first"), ("bbbbbbbbbbbb", b"second")):
            storage.begin(f"{STEP}/{attempt}")
            write(storage, f"{STEP}/{attempt}/model.safetensors", data)
            storage.settle(f"{STEP}/{attempt}")
        assert contents(storage, f"{STEP}/aaaaaaaaaaaa/model.safetensors") == b"first"
        assert contents(storage, f"{STEP}/bbbbbbbbbbbb/model.safetensors") == b"second"

    # Publishing

    def test_a_published_object_is_there_and_nothing_else(self, storage: Storage) -> None:
        storage.begin(FOLDER)
        storage.put(RECORD, b"{}")
        storage.publish(MANIFEST, b"new", replace=False)
        assert storage.read(MANIFEST, 100) == b"new"
        assert set(storage.list(STEP)) == {"0123456789ab", names.MANIFEST}

    def test_a_record_of_the_run_can_be_published_first_of_all(self, storage: Storage) -> None:
        storage.publish(names.REWINDS, b"{}", replace=True)
        assert storage.list("") == [names.REWINDS]

    def test_without_replace_what_is_there_stays(self, storage: Storage) -> None:
        storage.begin(FOLDER)
        storage.put(RECORD, b"{}")
        storage.publish(MANIFEST, b"old", replace=False)
        with pytest.raises(FileExistsError):
            storage.publish(MANIFEST, b"new", replace=False)
        assert storage.read(MANIFEST, 100) == b"old"
        assert set(storage.list(STEP)) == {"0123456789ab", names.MANIFEST}

    def test_of_many_that_publish_without_replace_one_wins(self, storage: Storage) -> None:
        storage.begin(FOLDER)
        start = threading.Barrier(8)

        def publish(number: int) -> int | None:
            start.wait(10)
            try:
                storage.publish(MANIFEST, b"%d" % number, replace=False)
            except FileExistsError:
                return None
            return number

        with ThreadPoolExecutor(8) as pool:
            winners = [n for n in pool.map(publish, range(8)) if n is not None]
        assert len(winners) == 1
        assert storage.read(MANIFEST, 100) == b"%d" % winners[0]

    def test_with_replace_there_is_always_the_old_or_the_new(self, storage: Storage) -> None:
        storage.begin(FOLDER)
        versions = [bytes([65 + i]) * (100 + i) for i in range(20)]
        storage.publish(MANIFEST, versions[0], replace=True)
        over = threading.Event()
        seen: set[bytes] = set()

        def watch() -> None:
            while not over.is_set():
                seen.add(storage.read(MANIFEST, 1000))

        with ThreadPoolExecutor(2) as pool:
            watching = [pool.submit(watch) for _ in range(2)]
            try:
                for version in versions[1:]:
                    storage.publish(MANIFEST, version, replace=True)
            finally:
                over.set()
            for watcher in watching:
                watcher.result()
        assert seen <= set(versions)
        assert storage.read(MANIFEST, 1000) == versions[-1]

    # Deleting

    def test_deleted_is_gone_and_deleting_again_is_no_error(self, storage: Storage) -> None:
        storage.begin(FOLDER)
        storage.publish(MANIFEST, b"{}", replace=False)
        storage.delete(MANIFEST)
        assert names.MANIFEST not in storage.list(STEP)
        with pytest.raises(FileNotFoundError):
            storage.read(MANIFEST, 100)
        storage.delete(MANIFEST)
        storage.publish(MANIFEST, b"again", replace=False)
        assert storage.read(MANIFEST, 100) == b"again"

    def test_a_removed_folder_is_gone_and_its_step_too(self, storage: Storage) -> None:
        storage.begin(FOLDER)
        write(storage, FILE, pattern(BLOCK + 1))
        storage.put(RECORD, b"{}")
        storage.remove_folder(FOLDER)
        assert storage.list(FOLDER) == []
        storage.remove_folder(FOLDER)
        storage.remove_folder(STEP)
        assert storage.list("") == []

    def test_foreign_files_are_not_removed(self, storage: Storage) -> None:
        storage.begin(FOLDER)
        storage.put(RECORD, b"{}")
        storage.put(f"{FOLDER}/notes.txt", b"mine")
        storage.remove_folder(FOLDER)
        storage.remove_folder(STEP)
        assert storage.read(f"{FOLDER}/notes.txt", 100) == b"mine"

    # Holding

    def test_readers_share_a_folder_and_keep_out_who_wants_it_alone(self, storage: Storage) -> None:
        storage.begin(FOLDER)
        storage.put(RECORD, b"{}")
        first, second = storage.hold(STEP), storage.hold(STEP)
        assert first is not None and second is not None
        assert storage.hold(STEP, exclusive=True, wait=False) is None
        first.close()
        assert storage.hold(STEP, exclusive=True, wait=False) is None
        second.close()
        with storage.hold(STEP, exclusive=True, wait=False) or pytest.fail("it is free"):
            assert storage.hold(STEP, wait=False) is None
            assert storage.hold(FOLDER, exclusive=True, wait=False) is not None
        first.close()
        assert storage.hold(STEP, wait=False) is not None

    def test_what_is_not_there_cannot_be_held(self, storage: Storage) -> None:
        with pytest.raises(FileNotFoundError):
            storage.hold(STEP)

    def test_who_waits_for_a_folder_gets_it(self, storage: Storage) -> None:
        storage.begin(FOLDER)
        storage.put(RECORD, b"{}")
        held = storage.hold(STEP)
        assert held is not None
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(storage.hold, STEP, exclusive=True)
            held.close()
            assert waiting.result(60) is not None

    def test_a_sweep_takes_leftovers_and_nothing_else(self, storage: Storage) -> None:
        storage.begin(FOLDER)
        write(storage, FILE, b"unfinished")
        storage.publish(names.REWINDS, b"", replace=True)
        storage.delete(names.REWINDS)
        storage.begin("step-00000008/0123456789ab")
        storage.put("step-00000008/0123456789ab/notes.txt", b"mine")
        Custody(storage, None).sweep()
        assert storage.list("") == ["step-00000008"]


def pattern(size: int) -> bytes:
    """Bytes no two blocks of which are alike."""
    return b"".join((i * 2654435761 % (1 << 64)).to_bytes(8, "little") for i in range(-(-size // 8)))[:size]


def aligned(size: int) -> memoryview:
    """Zeros, from a page on, as the library hands memory to storages."""
    return memoryview(mmap.mmap(-1, max(size, 1)))[:size]


def write(storage: Storage, key: str, data: bytes, *, piece: int = 1 << 20, threads: int = 1) -> None:
    """A file of `data`, written in pieces, the last one first."""
    memory = aligned(len(data))
    memory[:] = data
    file = storage.create(key, len(data))
    starts = range(0, len(data), piece)[::-1]
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(lambda start: file.write_at(start, memory[start : start + piece]), starts):
            pass
    file.finish()


def contents(storage: Storage, key: str) -> bytes:
    """All bytes of a file."""
    file = storage.open(key)
    try:
        buffer = aligned(file.size)
        assert file.read_into(0, buffer) == file.size
        return bytes(buffer)
    finally:
        file.close()
