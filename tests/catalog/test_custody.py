"""What the owner removes, in which order, and what it never touches."""

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import Part, commit, flip, small, snapshot, write_attempt

from asyncckpt.catalog.catalog import Catalog
from asyncckpt.catalog.custody import Custody
from asyncckpt.errors import CheckpointNotFoundError, CorruptCheckpointError
from asyncckpt.format import names
from asyncckpt.policy.keep import Keep
from asyncckpt.policy.records import Record
from asyncckpt.read.reader import CheckpointReader
from asyncckpt.storage.local import LocalStorage
from asyncckpt.storage.posix import Posix


class Recorder(Posix):
    """Records what removes, and what makes it durable."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.broken: set[str] = set()

    def unlink(self, path: str) -> None:
        self.calls.append(("unlink", path))
        super().unlink(path)

    def rmdir(self, path: str) -> None:
        self.calls.append(("rmdir", path))
        super().rmdir(path)

    def fsync_dir(self, path: str) -> None:
        if path in self.broken:
            raise OSError(errno.EIO, "broken")
        self.calls.append(("fsync", path))
        super().fsync_dir(path)


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(str(tmp_path / "run"), Recorder())


def calls(storage: LocalStorage) -> list[tuple[str, str]]:
    """What the recorder of `storage` saw, relative to the run."""
    assert isinstance(storage.posix, Recorder)
    return [(verb, os.path.relpath(path, storage.root)) for verb, path in storage.posix.calls]


def run_of(storage: LocalStorage) -> Path:
    return Path(storage.root)


def verify(storage: LocalStorage, step: int) -> None:
    CheckpointReader(Catalog(storage), step).verify()


def test_a_checkpoint_exists_when_its_manifest_does(storage: LocalStorage) -> None:
    catalog = Catalog(storage)
    assert catalog.committed() == [] and catalog.candidates() == []
    write_attempt(storage, 9, small(9))
    for step in (10, 2, 100_000_000, 3):
        commit(storage, step)
    assert catalog.committed() == [2, 3, 10, 100_000_000]
    assert catalog.candidates() == [100_000_000, 10, 3, 2]
    assert catalog.folders() == [2, 3, 9, 10, 100_000_000]
    with pytest.raises(CheckpointNotFoundError):
        catalog.manifest(9)


def test_sweep_removes_leftovers(storage: LocalStorage) -> None:
    commit(storage, 1)
    before = snapshot(run_of(storage))
    write_attempt(storage, 1, small(5))
    write_attempt(storage, 2, small(2))
    write_attempt(storage, 2, small(2))
    storage.put(names.temporary(names.REWINDS), b"")
    storage.put(f"step-00000001/{names.temporary(names.MANIFEST)}", b"")
    storage.put(f"step-00000002/{names.temporary(names.MANIFEST)}", b"")
    Custody(storage, None).sweep()
    assert snapshot(run_of(storage)) == before


def test_sweep_keeps_what_is_foreign(storage: LocalStorage, tmp_path: Path) -> None:
    run = run_of(storage)
    outside = LocalStorage(str(tmp_path / "outside"))
    commit(outside, 8)
    write_attempt(outside, 9, small(9))
    attempt = write_attempt(storage, 3, small(3)).attempt
    (run / "step-00000003" / attempt / "notes.txt").write_text("mine")
    (run / "step-00000003" / "0123456789ab").symlink_to(tmp_path / "outside" / "step-00000009")
    (run / "step-00000004").mkdir()
    (run / "step-00000004" / "model.safetensors").write_text("another tool's")
    (run / "step-00000004" / "state.json").write_text("another tool's")
    (run / "step-00000005").write_text("a file")
    (run / "step-00000008").symlink_to(tmp_path / "outside" / "step-00000008")
    (run / "step-00000009").symlink_to(tmp_path / "outside" / "step-00000009")
    (run / "step-7").mkdir()
    (run / "step-7" / "manifest.json").write_text("x")
    (run / "model.safetensors").write_text("x")
    (run / "tensorboard").mkdir()
    before = snapshot(tmp_path)
    Custody(storage, Keep(last=1)).sweep()
    gone = before.keys() - snapshot(tmp_path).keys()
    assert gone == {f"run/step-00000003/{attempt}/{n}" for n in ("model.safetensors", "state.json")}
    assert Catalog(storage).committed() == []


def test_sweep_leaves_a_damaged_manifest_and_all_that_may_be_its(storage: LocalStorage) -> None:
    commit(storage, 1)
    flip(run_of(storage) / "step-00000001" / names.MANIFEST, 10)
    write_attempt(storage, 1, small(1))
    before = snapshot(run_of(storage))
    Custody(storage, None).sweep()
    assert snapshot(run_of(storage)) == before


def test_sweep_leaves_an_attempt_that_is_being_written(storage: LocalStorage) -> None:
    custody = Custody(storage, None)
    manifest = write_attempt(storage, 1, small(1))
    custody.active.add(f"step-00000001/{manifest.attempt}")
    before = snapshot(run_of(storage))
    custody.sweep()
    assert snapshot(run_of(storage)) == before
    custody.active.clear()
    custody.sweep()
    assert snapshot(run_of(storage)) == {}


def assert_manifest_goes_first(storage: LocalStorage, step: int) -> None:
    """The manifest's removal is durable before any other file of `step` goes."""
    folder = names.step_name(step)
    seen = calls(storage)
    removed = [i for i, (verb, path) in enumerate(seen) if verb == "unlink" and path.startswith(f"{folder}/")]
    assert seen[removed[0]] == ("unlink", f"{folder}/{names.MANIFEST}")
    assert ("fsync", folder) in seen[removed[0] : removed[1]]


def test_delete_makes_the_checkpoint_not_exist_first(storage: LocalStorage) -> None:
    commit(LocalStorage(storage.root), 1)
    Custody(storage, None).delete(1)
    assert_manifest_goes_first(storage, 1)
    assert snapshot(run_of(storage)) == {}


def test_a_delete_that_could_not_be_made_durable_removes_no_bytes(storage: LocalStorage) -> None:
    manifest = commit(storage, 1)
    posix = storage.posix
    assert isinstance(posix, Recorder)
    posix.broken.add(storage.path("step-00000001"))
    custody = Custody(storage, None)
    for act in (lambda: custody.delete(1), lambda: custody.delete(1), custody.sweep):
        with pytest.raises(OSError, match="broken"):
            act()
        assert len(storage.list(f"step-00000001/{manifest.attempt}")) == 2
    posix.broken.clear()
    custody.sweep()
    assert snapshot(run_of(storage)) == {}


def test_retention_needs_a_verified_checkpoint(storage: LocalStorage) -> None:
    manifests = [commit(storage, step) for step in range(1, 6)]
    custody = Custody(storage, Keep(last=1))
    assert custody.after_commit(manifests[-1], None) == []
    assert Catalog(storage).committed() == [1, 2, 3, 4, 5]


@settings(max_examples=25)
@given(
    st.sets(st.integers(1, 30), min_size=1, max_size=6),
    st.sets(st.integers(1, 30)),
    st.integers(1, 3),
    st.none() | st.integers(1, 5),
)
def test_retention_keeps_what_the_policy_keeps_and_the_newest_verified(
    tmp_path_factory: pytest.TempPathFactory, steps: set[int], verified: set[int], last: int, every: int | None
) -> None:
    storage = LocalStorage(str(tmp_path_factory.mktemp("run")))
    manifests = {step: commit(storage, step) for step in steps}
    custody = Custody(storage, Keep(last, every))
    custody.verified |= verified
    retired = custody.after_commit(manifests[max(steps)], None)
    left = Catalog(storage).committed()
    newest = max(verified & steps, default=None)
    expected = set() if newest is None else set(Keep(last, every).retire([Record(step) for step in steps])) - {newest}
    assert set(retired) == expected and set(left) == steps - expected
    assert newest is None or newest in left
    for step in left:
        verify(storage, step)


def test_what_the_newest_verified_one_takes_from_older_ones_stays(storage: LocalStorage) -> None:
    """Step 3 lacks what step 2 has, and is all that is verified; newer ones may be damaged."""
    model, optimizer = ({name: Part(tree=name)} for name in ("model", "optimizer"))
    commit(storage, 1, model | optimizer)
    commit(storage, 2, optimizer, omitted=["model"])
    commit(storage, 3, model, omitted=["optimizer"])
    commit(storage, 4, model, omitted=["optimizer"])
    for step in (5, 6):
        commit(storage, step, model | optimizer)
    custody = Custody(storage, Keep(last=1))
    custody.verified.add(3)
    assert custody.retire() == [4]
    custody.verified.add(6)
    assert custody.retire() == [1, 2, 3, 5]


def test_a_replaced_attempt_goes_and_the_new_one_stays(storage: LocalStorage) -> None:
    old = commit(storage, 1)
    custody = Custody(storage, None)
    assert custody.attempt_of(1) == old.attempt
    new = commit(storage, 1, small(2), replace=True)
    custody.after_commit(new, old.attempt)
    custody.after_commit(new, new.attempt)
    assert sorted(storage.list("step-00000001")) == sorted([new.attempt, names.MANIFEST])
    verify(storage, 1)


def test_sequences_go_on_where_they_were(storage: LocalStorage) -> None:
    commit(storage, 1, sequence=7)
    commit(storage, 2, sequence=3)
    custody = Custody(storage, None)
    assert [custody.next_sequence(), custody.next_sequence()] == [8, 9]
    custody.rewind(0)
    custody.delete(1)
    custody.delete(2)
    assert Custody(storage, None).next_sequence() == 10


def test_rewind_hides_later_steps_until_they_are_saved_again(storage: LocalStorage) -> None:
    for step in (1, 2, 3, 4):
        commit(storage, step, sequence=step)
    custody = Custody(storage, Keep(last=9))
    custody.rewind(2)
    catalog = Catalog(storage)
    assert catalog.candidates() == [2, 1]
    assert catalog.committed() == [1, 2, 3, 4]
    new = commit(storage, 3, small(30), sequence=custody.next_sequence(), replace=True)
    assert catalog.candidates() == [3, 2, 1]
    custody.verified.add(3)
    assert custody.after_commit(new, None) == [4]
    assert catalog.committed() == [1, 2, 3]


def test_a_damaged_record_of_rewinds_is_an_error_not_a_silent_return(storage: LocalStorage) -> None:
    commit(storage, 1)
    commit(storage, 2)
    Custody(storage, None).rewind(1)
    flip(run_of(storage) / names.REWINDS, 12)
    for call in (Catalog(storage).candidates, lambda: Custody(storage, None)):
        with pytest.raises(CorruptCheckpointError, match="branch"):
            call()
