"""What somebody reads is not deleted, whichever process reads it and however that ends."""

import errno
import sys
from pathlib import Path

import pytest
from support.checkpoints import commit, small
from support.processes import Trainer

from asyncckpt.catalog.catalog import Catalog
from asyncckpt.catalog.custody import Custody
from asyncckpt.errors import CheckpointBusyError
from asyncckpt.policy.keep import Keep
from asyncckpt.read.reader import CheckpointReader
from asyncckpt.storage.local import LocalStorage
from asyncckpt.testing import FaultyPosix

READER = """
import sys
from asyncckpt.catalog.catalog import Catalog
from asyncckpt.read.reader import CheckpointReader
from asyncckpt.storage.local import LocalStorage

reader = CheckpointReader(Catalog(LocalStorage(sys.argv[1])), 1)
print("reading", flush=True)
sys.stdin.read(1)
reader.verify()
reader.close()
print("read", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(str(tmp_path / "run"))


def owner(storage: LocalStorage, keep: Keep | None = None) -> Custody:
    custody = Custody(storage, keep)
    custody.verified.update(custody.catalog.committed())
    return custody


@pytest.mark.skipif(sys.platform != "linux", reason="processes are watched by pidfd")
@pytest.mark.parametrize("killed", [False, True])
def test_what_another_process_reads_stays_until_it_has_read_it_or_is_killed(
    storage: LocalStorage, killed: bool
) -> None:
    for step in (1, 2, 3):
        commit(storage, step)
    custody = owner(storage, Keep(last=1))
    reader = Trainer(READER, storage.root)
    try:
        assert reader.read_line() == "reading"
        assert custody.retire() == [2]
        with pytest.raises(CheckpointBusyError, match="being read"):
            custody.delete(1)
        assert custody.catalog.committed() == [1, 3]
        if killed:
            reader.kill(9)
            reader.end()
        else:
            assert reader.process.stdin is not None
            reader.process.stdin.write(b"x")
            reader.process.stdin.flush()
            assert reader.read_line() == "read"
        assert custody.retire() == [1]
    finally:
        reader.close()


def test_a_reader_of_this_process_keeps_it_too_and_closing_lets_go(storage: LocalStorage) -> None:
    for step in (1, 2):
        commit(storage, step)
    custody = owner(storage, Keep(last=1))
    with CheckpointReader(Catalog(storage), 1) as reader, CheckpointReader(Catalog(storage), 1):
        assert custody.retire() == []
        reader.verify()
    assert custody.retire() == [1]


def test_a_reader_that_nobody_refers_to_lets_go(storage: LocalStorage) -> None:
    for step in (1, 2):
        commit(storage, step)
    CheckpointReader(Catalog(storage), 1).verify()
    assert owner(storage, Keep(last=1)).retire() == [1]


def test_an_attempt_that_was_replaced_goes_when_it_has_been_read(storage: LocalStorage) -> None:
    old = commit(storage, 1)
    custody = owner(storage)
    folder = "step-00000001"
    with CheckpointReader(Catalog(storage), 1) as reader:
        new = commit(storage, 1, small(2), replace=True)
        custody.after_commit(new, old.attempt)
        custody.sweep()
        reader.verify()
    assert set(storage.list(folder)) == {old.attempt, new.attempt, "manifest.json"}
    custody.after_commit(commit(storage, 2), None)
    assert set(storage.list(folder)) == {new.attempt, "manifest.json"}


def test_reading_goes_on_where_a_folder_cannot_be_held(storage: LocalStorage) -> None:
    commit(storage, 1)
    for number in (errno.ENOLCK, errno.EOPNOTSUPP):
        without = LocalStorage(storage.root, FaultyPosix().fail("lock", None, number))
        CheckpointReader(Catalog(without), 1).verify()
