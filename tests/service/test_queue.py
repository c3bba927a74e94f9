"""The bounded queue: what `save` does when it is full, and what it costs in memory."""

import os
import subprocess
import threading

import pytest
from support.models import train_step, training
from support.processes import PATIENCE, Hold

import asyncckpt
from asyncckpt.write import messages as m
from asyncckpt.write.client import ThreadWriter


@pytest.fixture
def hold(tmp_path, monkeypatch):
    return Hold(tmp_path / "hold", "pwrite").install(monkeypatch)


def test_skip_gives_the_save_up_and_goes_on(tmp_path, hold):
    state = training()
    with asyncckpt.Checkpointer(tmp_path / "run", max_in_flight=1, when_full="skip") as ckpt:
        first = ckpt.save(1, state)
        hold.wait_reached()
        second = ckpt.save(2, state)
        assert (second.done(), second.outcome, second.result()) == (True, "skipped", "skipped")
        hold.release()
        ckpt.wait_until_flushed(PATIENCE)
        assert first.outcome == "committed"
        assert ckpt.steps() == [1]
        assert ckpt.stats().skipped == 1


def test_whoever_sees_that_it_is_committed_finds_its_place_free(tmp_path, monkeypatch):
    """Though the thread that has copied it comes no further than to say so."""
    seen, send = threading.Event(), ThreadWriter.send

    def stands_then(self, message, *rest):
        send(self, message, *rest)
        if isinstance(message, m.Seal):
            assert seen.wait(PATIENCE)

    monkeypatch.setattr(ThreadWriter, "send", stands_then)
    state = training()
    with asyncckpt.Checkpointer(tmp_path / "run", max_in_flight=1, writer="thread", overlap=True) as ckpt:
        handle = ckpt.save(1, state)
        try:
            assert handle.result(PATIENCE) == "committed"
            assert ckpt.stats().in_flight == 0
        finally:
            seen.set()
        assert ckpt.save(2, state, when_full="raise").result(PATIENCE) == "committed"


def test_raise_says_that_the_queue_is_full(tmp_path, hold):
    state = training()
    with asyncckpt.Checkpointer(tmp_path / "run", max_in_flight=1) as ckpt:
        ckpt.save(1, state)
        hold.wait_reached()
        with pytest.raises(asyncckpt.QueueFullError, match="max_in_flight"):
            ckpt.save(2, state, when_full="raise")
        hold.release()
        ckpt.wait_until_flushed(PATIENCE)
        assert ckpt.steps() == [1]


def test_replace_gives_up_the_newest_that_waits_never_the_one_being_written(tmp_path, hold):
    state = training()
    with asyncckpt.Checkpointer(tmp_path / "run", max_in_flight=2, when_full="replace") as ckpt:
        first = ckpt.save(1, state)
        hold.wait_reached()
        second = ckpt.save(2, state)
        train_step(state)
        third = ckpt.save(3, state)
        assert second.result(PATIENCE) == "replaced"
        hold.release()
        ckpt.wait_until_flushed(PATIENCE)
        assert (first.outcome, third.outcome) == ("committed", "committed")
        assert ckpt.steps() == [1, 3]
        assert ckpt.stats().replaced == 1


def test_wait_holds_save_back_until_there_is_a_place(tmp_path, hold):
    state = training()
    with asyncckpt.Checkpointer(tmp_path / "run", max_in_flight=2) as ckpt:
        ckpt.save(1, state)
        hold.wait_reached()
        ckpt.save(2, state)
        handles = []
        saving = threading.Thread(target=lambda: handles.append(ckpt.save(3, state)))
        saving.start()
        saving.join(0.2)
        assert saving.is_alive()
        assert ckpt.stats().in_flight == 2
        hold.release()
        saving.join(PATIENCE)
        ckpt.wait_until_flushed(PATIENCE)
        assert ckpt.steps() == [1, 2, 3]
        assert handles[0].blocked > 0.1


@pytest.mark.parametrize("slots", [1, 3])
def test_memory_is_bounded_by_the_slots_and_does_not_grow(tmp_path, slots):
    state = training(width=256)
    with asyncckpt.Checkpointer(tmp_path / "run", max_in_flight=slots, keep=asyncckpt.Keep(last=1)) as ckpt:
        sizes = set()
        for step in range(30):
            train_step(state)
            handle = ckpt.save(step, state)
            assert ckpt.stats().in_flight <= slots
            sizes.add(ckpt.stats().arena_bytes)
        ckpt.wait_until_flushed(PATIENCE)
        assert max(sizes) <= slots * (handle.timeline.size * 1.5 + 65536)
        assert len(sizes) <= slots


def test_a_memory_limit_too_small_for_one_snapshot_is_an_error_and_writes_nothing(tmp_path):
    with asyncckpt.Checkpointer(tmp_path / "run", memory_limit=4096, writer="thread") as ckpt:
        with pytest.raises(asyncckpt.CheckpointError, match="memory_limit"):
            ckpt.save(1, training())
        assert ckpt.steps() == []
        assert os.listdir(tmp_path / "run") == [".asyncckpt.lock"]


def test_a_memory_limit_of_one_snapshot_lets_saves_take_turns(tmp_path):
    state = training()
    with asyncckpt.Checkpointer(tmp_path / "probe") as ckpt:
        ckpt.save(1, state)
        ckpt.wait_until_flushed(PATIENCE)
        one = ckpt.stats().arena_bytes
    with asyncckpt.Checkpointer(tmp_path / "run", memory_limit=one + one // 2, max_in_flight=4) as ckpt:
        for step in range(5):
            ckpt.save(step, state)
        ckpt.wait_until_flushed(PATIENCE)
        assert ckpt.stats().arena_bytes <= one + one // 2
        assert ckpt.steps() == [0, 1, 2, 3, 4]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one MiB."""
    where = tmp_path / "small"
    where.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", where], capture_output=True)
    if made.returncode:
        pytest.skip(f"needs root to mount a small tmpfs: {made.stderr.decode()}")
    yield where
    subprocess.run(["umount", "-l", where], check=True)


def test_a_disk_too_small_is_told_before_anything_is_taken(small_disk):
    with asyncckpt.Checkpointer(small_disk / "run") as ckpt:
        with pytest.raises(asyncckpt.StorageError, match="free"):
            ckpt.save(1, training(width=400))
        assert ckpt.stats().arena_bytes == 0


def test_a_disk_that_fills_up_fails_the_save_and_the_one_before_stays_whole(small_disk):
    state = training(width=96)  # about 350 kB
    with asyncckpt.Checkpointer(small_disk / "run") as ckpt:
        ckpt.save(1, state).result(PATIENCE)
        (small_disk / "ballast").write_bytes(bytes(500 << 10))
        failed = ckpt.save(2, state)
        with pytest.raises(asyncckpt.StorageError, match="No space left"):
            failed.result(PATIENCE)
        assert ckpt.steps() == [1]
        ckpt.verify(1)
        (small_disk / "ballast").unlink()
        assert ckpt.save(3, state).result(PATIENCE) == "committed"


def test_prepare_takes_the_memory_before_the_first_save(tmp_path):
    state = training()
    with asyncckpt.Checkpointer(tmp_path / "run", max_in_flight=2) as ckpt:
        ckpt.prepare(state)
        taken = ckpt.stats().arena_bytes
        assert taken > 0
        ckpt.save(1, state)
        ckpt.save(2, state)
        ckpt.wait_until_flushed(PATIENCE)
        assert ckpt.stats().arena_bytes == taken
