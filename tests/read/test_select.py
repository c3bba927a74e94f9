"""Which checkpoint is used: the newest that is good, said aloud; never silently none."""

import errno
import os
import warnings
from pathlib import Path

import pytest
from support.checkpoints import commit, flip

from asyncckpt.catalog.catalog import Catalog
from asyncckpt.catalog.custody import Custody
from asyncckpt.errors import CheckpointNotFoundError, CorruptCheckpointError, StorageError
from asyncckpt.format import names
from asyncckpt.read.reader import CheckpointReader
from asyncckpt.read.select import newest
from asyncckpt.storage.local import LocalStorage
from asyncckpt.storage.posix import Posix


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(LocalStorage(str(tmp_path)))


def damage(catalog: Catalog, step: int, name: str) -> None:
    """Flip a byte in one file of `step`."""
    folder = Path(catalog.storage.url) / names.step_name(step)
    flip(folder / name if name == names.MANIFEST else folder / catalog.manifest(step).attempt / name, 20)


def use_newest(catalog: Catalog) -> int | None:
    def read(step: int) -> int:
        CheckpointReader(catalog, step).verify()
        return step

    return newest(catalog, read)[0]


FILES = [names.MANIFEST, names.RECORD, "model.safetensors"]


def test_none_only_where_nothing_was_ever_committed(catalog: Catalog) -> None:
    assert newest(catalog, lambda step: step) == (None, {})


def test_the_newest_is_used_without_a_word(catalog: Catalog) -> None:
    for step in (5, 20, 100_000_000, 100):
        commit(catalog.storage, step)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert use_newest(catalog) == 100_000_000


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_newest_falls_back_and_says_so(catalog: Catalog, name: str) -> None:
    for step in (1, 2, 3):
        commit(catalog.storage, step)
    damage(catalog, 3, name)
    with pytest.warns(UserWarning, match=r"step 1 is used; passed over step 3 .*; step 2"):
        damage(catalog, 2, FILES[0])
        assert use_newest(catalog) == 1


@pytest.mark.parametrize("name", FILES)
def test_all_damaged_is_an_error(catalog: Catalog, name: str) -> None:
    for step in (1, 2):
        commit(catalog.storage, step)
        damage(catalog, step, name)
    with pytest.raises(CorruptCheckpointError, match=r"every checkpoint is damaged: step 2 .*; step 1"):
        use_newest(catalog)


def test_a_storage_that_fails_is_passed_over_too(catalog: Catalog) -> None:
    commit(catalog.storage, 1)
    commit(catalog.storage, 2)

    def read(step: int) -> int:
        if step == 2:
            raise StorageError("can't read")
        return step

    with pytest.warns(UserWarning, match="passed over step 2"):
        assert newest(catalog, read) == (1, {2: "can't read"})


def test_what_vanishes_while_it_is_read_is_not_damaged(catalog: Catalog) -> None:
    commit(catalog.storage, 1)
    commit(catalog.storage, 2)

    def read(step: int) -> int:
        if step == 2:
            Custody(catalog.storage, None).delete(2)
        CheckpointReader(catalog, step).verify()
        return step

    assert newest(catalog, read) == (1, {})


def test_a_newer_one_that_appears_meanwhile_is_used(catalog: Catalog) -> None:
    commit(catalog.storage, 1)

    def read(step: int) -> int:
        if step == 1:
            Custody(catalog.storage, None).delete(1)
            commit(catalog.storage, 2)
            raise CheckpointNotFoundError("gone")
        return step

    assert newest(catalog, read) == (2, {})


def test_what_is_not_in_a_good_checkpoint_is_an_error(catalog: Catalog) -> None:
    commit(catalog.storage, 1)
    commit(catalog.storage, 2)
    with pytest.raises(CheckpointNotFoundError, match="no part"):
        newest(catalog, lambda step: CheckpointReader(catalog, step).part("nothing"))


def test_a_rewound_branch_is_not_chosen(catalog: Catalog) -> None:
    for step in (1, 2, 3):
        commit(catalog.storage, step)
    Custody(catalog.storage, None).rewind(2)
    assert use_newest(catalog) == 2


class Refusing(Posix):
    """Opening a file whose path ends in `ending` fails with `number`."""

    def __init__(self, ending: str, number: int) -> None:
        self.ending, self.number = ending, number

    def open(self, path: str, direct: bool) -> int:
        if path.endswith(self.ending):
            raise OSError(self.number, os.strerror(self.number))
        return super().open(path, direct)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES])
def test_a_failing_of_the_reader_is_no_reason_to_take_an_older_one(catalog: Catalog, number: int) -> None:
    for step in (1, 2):
        commit(catalog.storage, step)
    with pytest.raises(StorageError) as caught:
        use_newest(Catalog(LocalStorage(catalog.storage.url, Refusing("model.safetensors", number))))
    assert caught.value.errno == number


def test_after_a_rewind_an_unreadable_manifest_is_passed_over_too(catalog: Catalog) -> None:
    for step in (1, 2, 3):
        commit(catalog.storage, step)
    storage = LocalStorage(catalog.storage.url, Refusing(f"{names.step_name(2)}/{names.MANIFEST}", errno.EIO))
    Custody(catalog.storage, None).rewind(2)
    with pytest.warns(UserWarning, match="passed over step 2"):
        assert use_newest(Catalog(storage)) == 1
    assert Custody(storage, None).next_sequence() > 0
