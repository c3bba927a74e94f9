"""Pins and metrics that come after the commit: durable, never lost, and never a reason to delete."""

import hashlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.checkpoints import commit, flip, small, snapshot, write_attempt
from support.dying import Dead, DyingPosix

from asyncckpt.catalog import notes
from asyncckpt.catalog.catalog import Catalog
from asyncckpt.catalog.custody import Custody
from asyncckpt.errors import CheckpointBusyError, CheckpointNotFoundError, CorruptCheckpointError
from asyncckpt.format import names
from asyncckpt.policy.keep import Keep
from asyncckpt.read.reader import CheckpointReader
from asyncckpt.storage.local import LocalStorage


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(LocalStorage(str(tmp_path / "run")))


def custody(catalog: Catalog, keep: Keep | None = None) -> Custody:
    """An owner that trusts all that is there."""
    owner = Custody(catalog.storage, keep)
    owner.verified.update(catalog.committed())
    return owner


def notes_file(catalog: Catalog, step: int) -> Path:
    return Path(catalog.storage.url) / names.step_name(step) / names.NOTES


def test_what_is_pinned_stays_until_it_is_unpinned(catalog: Catalog) -> None:
    for step in (1, 2, 3):
        commit(catalog.storage, step)
    notes.pin(catalog, 1)
    owner = custody(catalog, Keep(last=1))
    assert owner.retire() == [2] and catalog.committed() == [1, 3]
    with pytest.raises(CheckpointBusyError, match="unpin"):
        owner.delete(1)
    CheckpointReader(catalog, 1).verify()
    notes.pin(catalog, 1, False)
    assert owner.retire() == [1]
    assert not notes_file(catalog, 1).parent.exists()


def test_a_pin_holds_on_a_branch_that_was_left(catalog: Catalog) -> None:
    for step in (1, 2, 3):
        commit(catalog.storage, step)
    notes.pin(catalog, 3)
    owner = custody(catalog, Keep(last=9))
    owner.rewind(1)
    assert owner.retire() == [2] and catalog.committed() == [1, 3]


def test_of_metrics_the_later_one_counts(catalog: Catalog) -> None:
    commit(catalog.storage, 1, metrics={"loss": 3.0})
    notes.annotate(catalog, 1, {"loss": 2.0, "acc": 0.5})
    notes.pin(catalog, 1)
    notes.annotate(catalog, 1, {"loss": 1.0})
    (record,) = catalog.records()
    assert record.metrics == {"loss": 1.0, "acc": 0.5} and record.pinned


def test_what_is_saved_anew_keeps_its_pin_and_not_its_metrics(catalog: Catalog) -> None:
    commit(catalog.storage, 1)
    notes.pin(catalog, 1)
    notes.annotate(catalog, 1, {"loss": 2.0})
    commit(catalog.storage, 1, replace=True)
    assert [(r.pinned, r.metrics) for r in catalog.records()] == [(True, {})]
    notes.annotate(catalog, 1, {"acc": 0.5})
    assert [(r.pinned, r.metrics) for r in catalog.records()] == [(True, {"acc": 0.5})]


@pytest.mark.parametrize("act", [notes.pin, lambda c, s: notes.annotate(c, s, {"loss": 1.0})])
def test_only_what_is_committed_has_notes(catalog: Catalog, act: Callable[[Catalog, int], None]) -> None:
    with pytest.raises(CheckpointNotFoundError, match="step 1"):
        act(catalog, 1)
    write_attempt(catalog.storage, 1, small(1))
    with pytest.raises(CheckpointNotFoundError, match="step 1"):
        act(catalog, 1)
    assert not notes_file(catalog, 1).exists()


def test_damaged_notes_delete_nothing_and_are_not_written_over(catalog: Catalog) -> None:
    for step in (1, 2, 3):
        commit(catalog.storage, step)
    notes.pin(catalog, 1)
    notes.annotate(catalog, 2, {"loss": 1.0})
    for step in (1, 2):
        flip(notes_file(catalog, step), 20)
    before = snapshot(Path(catalog.storage.url))
    owner = custody(catalog, Keep(last=1, best=1, metric="loss"))
    assert owner.retire() == []
    for step in (1, 2):
        with pytest.raises(CorruptCheckpointError, match="remove the file"):
            notes.pin(catalog, step)
        with pytest.raises(CorruptCheckpointError, match="remove the file"):
            notes.annotate(catalog, step, {"loss": 2.0})
        with pytest.raises(CorruptCheckpointError):
            owner.delete(step)
        CheckpointReader(catalog, step).verify()
    assert snapshot(Path(catalog.storage.url)) == before
    notes_file(catalog, 1).unlink()
    notes_file(catalog, 2).unlink()
    notes.annotate(catalog, 3, {"loss": 2.0})
    assert owner.retire() == [1, 2]


def test_of_changes_at_the_same_time_none_is_lost(catalog: Catalog) -> None:
    commit(catalog.storage, 1)
    with ThreadPoolExecutor(8) as pool:
        changes = [pool.submit(notes.annotate, catalog, 1, {f"m{i}": float(i)}) for i in range(40)]
        changes.append(pool.submit(notes.pin, catalog, 1))
        for change in changes:
            change.result(60)
    (record,) = catalog.records()
    assert record.pinned and record.metrics == {f"m{i}": float(i) for i in range(40)}


def test_a_pin_and_a_delete_at_the_same_time_agree(catalog: Catalog) -> None:
    """Either it is pinned and there, or it is gone and the pin says so."""
    ends = set()
    for step in range(60):
        commit(catalog.storage, step)
        owner, start = custody(catalog), threading.Barrier(2)

        def delete(step: int = step, owner: Custody = owner, start: threading.Barrier = start) -> bool:
            start.wait(60)
            try:
                owner.delete(step)
            except CheckpointBusyError:
                return False
            return True

        with ThreadPoolExecutor(1) as pool:
            deleted = pool.submit(delete)
            start.wait(60)
            try:
                notes.pin(catalog, step)
                pinned = True
            except CheckpointNotFoundError:
                pinned = False
            assert pinned == (not deleted.result(60)) == catalog.exists(step)
        if pinned:
            CheckpointReader(catalog, step).verify()
        ends.add(pinned)
    assert ends  # which of the two wins is up to the machine


def test_a_death_at_any_operation_leaves_the_old_notes_or_the_new(catalog: Catalog) -> None:
    commit(catalog.storage, 1)
    notes.annotate(catalog, 1, {"loss": 0.0})
    for at in range(1, 50):
        (before,) = catalog.records()
        storage = LocalStorage(catalog.storage.url, DyingPosix(at))
        try:
            notes.annotate(Catalog(storage), 1, {"loss": float(at)})
        except Dead:
            (after,) = catalog.records()
            assert not after.doubt and after.metrics in (before.metrics, {"loss": float(at)})
        else:
            break
    assert 5 < at < 49
    custody(catalog).sweep()
    files = [path.name for path in notes_file(catalog, 1).parent.iterdir() if path.is_file()]
    assert sorted(files) == [names.MANIFEST, names.NOTES]


def test_leftover_notes_go_and_a_foreign_file_of_their_name_stays(catalog: Catalog) -> None:
    for step in (1, 2):
        commit(catalog.storage, step)
        notes.annotate(catalog, step, {"loss": 1.0})
        (Path(catalog.storage.url) / names.step_name(step) / names.MANIFEST).unlink()
    notes_file(catalog, 2).write_text("mine")
    pipe = notes_file(catalog, 0)
    pipe.parent.mkdir()
    os.mkfifo(pipe)
    custody(catalog).sweep()
    pipe.unlink()
    pipe.parent.rmdir()
    assert snapshot(Path(catalog.storage.url)) == {"step-00000002": None, "step-00000002/notes.json": b"mine"}


def sealed(body: bytes) -> bytes:
    return body[:-1] + b',"sha256":"' + hashlib.sha256(body[:-1]).hexdigest().encode() + b'"}\n'


GOOD = b'"step":1,"attempt":"0123456789ab","pinned":false,"format":1'
HOSTILE = {
    "empty": b"",
    "not sealed": b"{" + GOOD + b"}",
    "of another step": sealed(b"{" + GOOD.replace(b":1,", b":2,") + b"}"),
    "of no attempt": sealed(b"{" + GOOD.replace(b"0123456789ab", b"../../../etc") + b"}"),
    "a pin that is text": sealed(b"{" + GOOD.replace(b"false", b'"no"') + b"}"),
    "a metric that is text": sealed(b"{" + GOOD + b',"metrics":{"loss":"low"}}'),
    "a metric beyond all numbers": sealed(b"{" + GOOD + b',"metrics":{"loss":1e999}}'),
    "metrics that are a list": sealed(b"{" + GOOD + b',"metrics":[1]}'),
    "deep": sealed(b"{" + GOOD + b',"metrics":{"loss":' + b"[" * 100_000 + b"]" * 100_000 + b"}}"),
    "of a later format": sealed(b"{" + GOOD.replace(b'format":1', b'format":2') + b"}"),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_notes_that_make_no_sense_are_a_doubt_and_delete_nothing(catalog: Catalog, how: str) -> None:
    for step in (1, 2, 3):
        commit(catalog.storage, step)
    notes_file(catalog, 1).write_bytes(HOSTILE[how])
    assert [bool(record.doubt) for record in catalog.records()] == [True, False, False]
    assert custody(catalog, Keep(last=1)).retire() == [2]
    CheckpointReader(catalog, 1).verify()


def as_folder(path: Path) -> None:
    path.mkdir()


def as_link(path: Path) -> None:
    path.with_name("elsewhere").write_bytes(sealed(b"{" + GOOD + b"}"))
    path.symlink_to(path.with_name("elsewhere"))


def as_huge(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 40)


@pytest.mark.parametrize("make", [os.mkfifo, as_folder, as_link, as_huge])
def test_notes_that_are_no_plain_file_are_a_doubt(catalog: Catalog, make: Callable[[Path], None]) -> None:
    for step in (1, 2, 3):
        commit(catalog.storage, step)
    make(notes_file(catalog, 1))
    assert [bool(record.doubt) for record in catalog.records()] == [True, False, False]
    assert custody(catalog, Keep(last=1)).retire() == [2]
