"""What is known of a run without reading its bytes."""

import errno
import math
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest
from support.checkpoints import commit, flip

from asyncckpt.catalog.catalog import Catalog
from asyncckpt.catalog.custody import Custody
from asyncckpt.errors import StorageError
from asyncckpt.format import names
from asyncckpt.format.manifest import Notes, encode
from asyncckpt.storage.local import LocalStorage
from asyncckpt.storage.posix import Posix


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(str(tmp_path / "run"))


def note(storage: LocalStorage, step: int, attempt: str, **members: object) -> Path:
    """Notes of `step`, as they lie on the disk."""
    key = f"{names.step_name(step)}/{names.NOTES}"
    storage.publish(key, encode(Notes(step, attempt, **members)), replace=True)  # type: ignore[arg-type]
    return Path(storage.path(key))


def test_a_record_says_what_manifest_and_notes_say(storage: LocalStorage) -> None:
    first = commit(storage, 1, created="2026-02-03T04:05:06.789+01:00", metrics={"loss": 0.5, "bad": None})
    commit(storage, 2, created="no time")
    note(storage, 1, first.attempt, pinned=True, metrics={"loss": 0.25, "acc": 0.9})
    one, two = Catalog(storage).records()
    assert (one.step, one.attempt, one.sequence, one.size) == (1, first.attempt, 1, first.size)
    assert one.created == datetime(2026, 2, 3, 3, 5, 6, 789000, tzinfo=UTC) and two.created is None
    assert one.parts == ("model", "note") and one.complete
    assert math.isnan(one.metrics["bad"]) and (one.metrics["loss"], one.metrics["acc"]) == (0.25, 0.9)
    assert one.pinned and not two.pinned and not two.metrics
    assert not (one.rewound or one.damaged or one.doubt)


def test_metrics_noted_of_an_attempt_mean_nothing_for_the_next_and_a_pin_does(storage: LocalStorage) -> None:
    first = commit(storage, 1, metrics={"loss": 1.0})
    note(storage, 1, first.attempt, pinned=True, metrics={"loss": 0.5})
    commit(storage, 1, replace=True, metrics={"loss": 2.0})
    (record,) = Catalog(storage).records()
    assert record.metrics == {"loss": 2.0} and record.pinned


def test_what_cannot_be_read_is_in_doubt(storage: LocalStorage) -> None:
    for step in (1, 2, 3):
        note(storage, step, commit(storage, step, metrics={"loss": 1.0}).attempt, pinned=True)
    flip(Path(storage.path(f"step-00000001/{names.MANIFEST}")), 10)
    flip(Path(storage.path(f"step-00000002/{names.NOTES}")), 10)
    one, two, three = Catalog(storage).records()
    assert one.damaged and "manifest" in one.doubt
    assert not two.damaged and "notes.json" in two.doubt and two.metrics == {"loss": 1.0}
    assert three.pinned and not three.doubt


def test_a_branch_that_was_left_is_marked(storage: LocalStorage) -> None:
    for step in (1, 2, 3):
        commit(storage, step)
    Custody(storage, None).rewind(1)
    assert [r.rewound for r in Catalog(storage).records()] == [False, True, True]


class Refusing(Posix):
    """Opening a manifest fails with `number`."""

    def __init__(self, number: int) -> None:
        self.number = number

    def open(self, path: str, direct: bool) -> int:
        if path.endswith(names.MANIFEST):
            raise OSError(self.number, os.strerror(self.number))
        return super().open(path, direct)


def test_a_failing_of_the_reader_is_raised_and_one_of_the_disk_is_a_doubt(storage: LocalStorage) -> None:
    commit(storage, 1)
    with pytest.raises(StorageError):
        Catalog(LocalStorage(storage.root, Refusing(errno.EMFILE))).records()
    (record,) = Catalog(LocalStorage(storage.root, Refusing(errno.EIO))).records()
    assert record.damaged
