"""The test kit itself: the model says of a real directory what is true of it, and faults come when they are due."""

import errno
import os
import signal
import subprocess
import sys
import threading

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from asyncckpt.testing import (
    CHANGES,
    FaultyPosix,
    FifoHold,
    Hold,
    Note,
    RecordingPosix,
    power_cuts,
)
from asyncckpt.testing.crash import Disk, FileSystem
from asyncckpt.testing.recording import fsynced_again
from crash.rig import memory_folder


def disks(posix, base, samples=64):
    """All that a power cut may leave now."""
    cuts = power_cuts(posix.log, base, samples=samples, seed=1, points=[len(posix.log)])
    return [dict(cut.disk.tree) for cut in cuts]


def file(posix, path, data, fsync=False):
    fd = posix.create(str(path), False)
    posix.pwrite(fd, data, 0)
    if fsync:
        posix.fsync(fd)
    posix.close(fd)


def test_nothing_is_promised_of_a_file_that_was_not_fsynced(tmp_path):
    posix = RecordingPosix()
    file(posix, tmp_path / "a", b"x" * 8192)
    found = disks(posix, tmp_path, samples=2000)
    assert {} in found
    assert {"a": b""} in found
    assert {"a": b"x" * 8192} in found
    assert {"a": bytes(4096) + b"x" * 4096} in found
    assert any(b"\xdb" in (disk.get("a") or b"") for disk in found)


def test_an_fsync_of_a_file_says_nothing_of_its_name(tmp_path):
    posix = RecordingPosix()
    file(posix, tmp_path / "a", b"x", fsync=True)
    assert sorted(map(len, disks(posix, tmp_path))) == [0, 1]
    assert {"a": b"x"} in disks(posix, tmp_path)


def test_an_fsync_of_a_directory_says_nothing_of_what_its_names_stand_for(tmp_path):
    posix = RecordingPosix()
    file(posix, tmp_path / "a", b"x")
    posix.mkdir(str(tmp_path / "folder"))
    file(posix, tmp_path / "folder/b", b"y", fsync=True)
    posix.fsync_dir(str(tmp_path))
    found = disks(posix, tmp_path)
    assert all({"a", "folder"} <= set(disk) for disk in found)
    assert {"a": b"", "folder": None} in found
    posix.fsync_dir(str(tmp_path / "folder"))
    assert all(disk["folder/b"] == b"y" for disk in disks(posix, tmp_path))


def test_a_rename_happens_as_a_whole_and_a_link_apart_from_the_unlink(tmp_path):
    posix = RecordingPosix()
    file(posix, tmp_path / "old", b"old", fsync=True)
    file(posix, tmp_path / "new", b"new", fsync=True)
    posix.fsync_dir(str(tmp_path))
    posix.rename(str(tmp_path / "new"), str(tmp_path / "old"))
    assert sorted(map(str, disks(posix, tmp_path))) == ["{'old': b'new'}", "{'old': b'old', 'new': b'new'}"]
    posix.fsync_dir(str(tmp_path))
    posix.link(str(tmp_path / "old"), str(tmp_path / "second"))
    posix.unlink(str(tmp_path / "old"))
    assert sorted(sorted(disk) for disk in disks(posix, tmp_path)) == [[], ["old"], ["old", "second"], ["second"]]


def test_sizes_are_volatile_too(tmp_path):
    posix = RecordingPosix()
    fd = posix.create(str(tmp_path / "a"), False)
    posix.pwrite(fd, b"abcd", 0)
    posix.fsync(fd)
    posix.fsync_dir(str(tmp_path))
    posix.truncate(fd, 2)
    posix.reserve(fd, 6)
    posix.close(fd)
    assert {d["a"] for d in disks(posix, tmp_path)} == {b"abcd", b"ab", b"abcd\0\0", b"ab\0\0\0\0"}


def test_after_an_fsync_that_failed_a_later_one_promises_nothing_of_what_was_written_before(tmp_path):
    posix = RecordingPosix(FaultyPosix().fail("fsync", 1, errno.EIO))
    fd = posix.create(str(tmp_path / "a"), False)
    posix.fsync_dir(str(tmp_path))
    posix.pwrite(fd, b"lost?", 0)
    with pytest.raises(OSError):
        posix.fsync(fd)
    posix.pwrite(fd, b"kept", 8)
    posix.fsync(fd)
    posix.close(fd)
    found = {disk["a"] for disk in disks(posix, tmp_path)}
    assert {bytes(8) + b"kept", b"lost?\0\0\0kept"} <= found
    assert all(data.endswith(b"kept") for data in found)
    assert fsynced_again(posix.log) == [str(tmp_path / "a")]


NAMES = st.sampled_from(["a", "b", "folder/a", "folder/b", "folder"])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("file"), NAMES, st.binary(max_size=20), st.booleans()),
        st.tuples(st.sampled_from(["mkdir", "unlink", "rmdir"]), NAMES),
        st.tuples(st.sampled_from(["rename", "link"]), NAMES, NAMES),
    ),
    max_size=15,
)


@settings(max_examples=60)
@example([("file", "b", b"", False), ("link", "b", "a"), ("rename", "a", "b")])
@given(STEPS)
def test_what_a_process_sees_is_what_is_there(steps):
    """And once everything has been fsynced, it is the only disk that a power cut can leave."""
    with memory_folder() as base:
        posix = RecordingPosix()
        for verb, *arguments in steps:
            paths = [str(base / a) for a in arguments if isinstance(a, str)]
            try:
                if verb == "file":
                    file(posix, paths[0], *arguments[1:])
                else:
                    getattr(posix, verb)(*paths)
            except OSError:
                pass
        real = Disk.of(base)
        system = FileSystem(base)
        for index, operation in enumerate(posix.operations):
            system.apply(operation, index)
        assert dict(system.live().tree) == dict(real.tree)
        assert dict(FileSystem(base, real).after(lambda _: False).tree) == dict(real.tree)
        posix.fsync_dir(str(base))
        if (base / "folder").is_dir():
            posix.fsync_dir(str(base / "folder"))
        if all(fsync for verb, *_, fsync in steps if verb == "file"):
            assert disks(posix, base) == [dict(real.tree)]


def test_a_disk_that_is_made_real_is_the_same_again(tmp_path):
    disk = Disk({"folder": None, "folder/a": b"data", "empty": None, "b": b""})
    disk.make(tmp_path)
    assert dict(Disk.of(tmp_path).tree) == dict(disk.tree)


def test_cuts_are_the_same_for_the_same_seed(tmp_path):
    posix = RecordingPosix()
    for name in "abcdefgh":
        file(posix, tmp_path / name, b"x" * 5000)
    posix.note("done")
    assert posix.log[-1] == Note("done")
    assert disks(posix, tmp_path) == disks(posix, tmp_path)
    assert len(disks(posix, tmp_path, samples=20)) <= 20


def test_a_fault_comes_at_its_call_and_only_there(tmp_path):
    posix = FaultyPosix().fail("mkdir", 2, errno.ENOSPC)
    posix.mkdir(str(tmp_path / "1"))
    with pytest.raises(OSError) as caught:
        posix.mkdir(str(tmp_path / "2"))
    assert caught.value.errno == errno.ENOSPC
    posix.mkdir(str(tmp_path / "3"))
    assert sorted(os.listdir(tmp_path)) == ["1", "3"]
    assert posix.fired == 1


def test_a_lasting_fault_lasts_until_healed(tmp_path):
    posix = FaultyPosix().fail("mkdir", 1, errno.EROFS, lasting=True)
    for _ in range(2):
        with pytest.raises(OSError):
            posix.mkdir(str(tmp_path / "1"))
    posix.heal()
    posix.mkdir(str(tmp_path / "1"))


def test_a_kill_in_the_middle_of_a_write_leaves_half_of_it(tmp_path):
    source = (
        "import sys; from asyncckpt.testing import FaultyPosix;"
        "p = FaultyPosix().kill(2, 'during'); p.pwrite(p.create(sys.argv[1], False), b'x' * 4096, 0)"
    )
    done = subprocess.run([sys.executable, "-c", source, str(tmp_path / "a")], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "a").read_bytes() == b"x" * 2048


@pytest.mark.parametrize("kind", [Hold, FifoHold])
def test_a_hold_stands_until_it_is_released(tmp_path, kind):
    hold = kind(tmp_path, 30) if kind is FifoHold else kind(30)
    posix = FaultyPosix().hold("mkdir", 1, hold)
    thread = threading.Thread(target=posix.mkdir, args=[str(tmp_path / "made")])
    thread.start()
    assert hold.wait_reached()
    assert not (tmp_path / "made").exists()
    hold.release()
    thread.join(30)
    assert (tmp_path / "made").exists()
    if kind is FifoHold:
        hold.close()


def test_a_delay_delays(tmp_path):
    posix = FaultyPosix().delay("mkdir", None, 0.01)
    posix.mkdir(str(tmp_path / "made"))
    assert posix.fired == 1


def test_a_recording_has_what_the_file_took(tmp_path):
    posix = RecordingPosix(FaultyPosix().shorten(1))
    fd = posix.create(str(tmp_path / "a"), False)
    data = bytearray(b"x" * 1024)
    assert posix.pwrite(fd, memoryview(data), 0) == 512
    data[:] = bytes(1024)
    posix.close(fd)
    assert [operation.verb for operation in posix.operations] == ["create", "pwrite", "close"]
    assert posix.operations[1].data == b"x" * 512


def test_the_kit_needs_no_torch():
    source = "import asyncckpt.testing, asyncckpt.testing.suite, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", source], timeout=60).returncode == 0
    assert len(set(CHANGES)) == len(CHANGES)
