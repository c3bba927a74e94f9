"""What is restored is the newest of both tiers that verifies, here first; never silently nothing."""

import warnings
from pathlib import Path

import pytest
import torch
from support.checkpoints import commit, flip, small

import asyncckpt
from asyncckpt import tiers
from asyncckpt.catalog.custody import Custody
from asyncckpt.catalog.ownership import RunLock
from asyncckpt.fetching import Wish
from asyncckpt.format import names
from asyncckpt.format.manifest import Rewind, Rewinds, encode
from asyncckpt.run import Run
from asyncckpt.storage.local import LocalStorage

STATE = {"x": torch.arange(10)}
_ANY = Wish()


@pytest.fixture
def both(tmp_path):
    """Two empty tiers, and what they are read as."""
    here, there = LocalStorage(str(tmp_path / "run")), LocalStorage(str(tmp_path / "mirror"))
    return here, there, lambda: Run(here.root, mirror=there.root)


def damage(storage, step, name="model.safetensors"):
    attempt = Custody(storage, None).attempt_of(step)
    flip(Path(storage.root) / names.step_name(step) / attempt / name, 20)


def test_here_first_and_there_what_is_not_here(both):
    here, there, run = both
    commit(here, 2, small(22), sequence=2)
    commit(there, 1, small(11), sequence=1)
    commit(there, 2, small(22), sequence=2)
    commit(there, 3, small(33), sequence=3)
    assert run().steps() == [1, 2, 3]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run().fetch(2, _ANY).origin == here.root
        assert run().fetch(3, _ANY).origin == run().fetch(None, _ANY).origin == there.root
    with pytest.raises(asyncckpt.CheckpointNotFoundError, match="step 4"):
        run().fetch(4, _ANY)


@pytest.mark.parametrize("name", ["model.safetensors", "state.json"])
def test_what_is_damaged_here_is_read_there(both, name):
    here, there, run = both
    for storage in (here, there):
        commit(storage, 1, small(5), sequence=1)
        commit(storage, 2, small(7), sequence=2)
    damage(here, 2, name)
    with pytest.warns(UserWarning, match=r"step 2 is read from .*mirror"):
        loaded = run().fetch(None, _ANY)
    assert (loaded.step, loaded.origin, loaded.passed_over) == (2, there.root, {})
    assert loaded.parts["note"] == {"seed": 7}
    damage(there, 2, name)
    with pytest.warns(UserWarning, match="passed over step 2"):
        assert run().fetch(None, _ANY).step == 1


def test_a_damaged_manifest_here(both):
    here, there, run = both
    for storage in (here, there):
        commit(storage, 1, small(5), sequence=1)
    flip(Path(here.root) / names.step_name(1) / names.MANIFEST, 9)
    with pytest.warns(UserWarning, match="step 1 is read from"):
        assert run().fetch(None, _ANY).origin == there.root


def test_a_branch_that_was_left_is_left_on_both(both):
    """The mirror lags behind: the rewind is known here only."""
    here, there, run = both
    commit(here, 1, small(1), sequence=1)
    for step, sequence in ((1, 1), (2, 2), (3, 3)):
        commit(there, step, small(step), sequence=sequence)
    here.publish(names.REWINDS, encode(Rewinds(rewinds=[Rewind(1, 3)])), replace=True)
    assert run().steps() == [1]
    assert run().fetch(None, _ANY).step == 1


def test_saved_again_elsewhere_the_later_one_counts(both):
    """A node that comes back holds what another has left, and saved anew."""
    here, there, run = both
    commit(here, 1, small(1), sequence=1)
    commit(here, 2, small(2), sequence=2)
    commit(there, 2, small(9), sequence=5)
    assert run().fetch(2, _ANY).parts["note"] == {"seed": 9}
    there.publish(names.REWINDS, encode(Rewinds(rewinds=[Rewind(1, 3)])), replace=True)
    assert run().steps() == [1, 2]
    assert run().fetch(None, _ANY).parts["note"] == {"seed": 9}
    damage(there, 2)
    with pytest.warns(UserWarning, match="passed over step 2"):
        assert run().fetch(None, _ANY).step == 1


class Silent(LocalStorage):
    def list(self, prefix):
        raise asyncckpt.StorageError("no route", retryable=True)


def test_a_mirror_that_can_not_be_read(both, monkeypatch):
    here, there, run = both
    silent = run()
    silent._tiers = tiers.Tiers(here, Silent(there.root))
    with pytest.raises(asyncckpt.StorageError, match="no route"):
        silent.fetch(None, _ANY)
    commit(here, 1, small(1))
    assert silent.fetch(None, _ANY).step == 1
    assert silent.steps() == [1]


def test_nothing_starts_anew_because_the_mirror_is_not_reached(tmp_path):
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / names.REWINDS).mkdir()  # can't be read
    options = {"mirror": tmp_path / "mirror", "writer": "thread"}
    with pytest.raises(asyncckpt.StorageError, match="is empty, and whether its mirror"):
        asyncckpt.Checkpointer(tmp_path / "run", **options)
    with asyncckpt.Checkpointer(tmp_path / "run", writer="thread") as ckpt:
        ckpt.save(1, STATE)
    ckpt = asyncckpt.Checkpointer(tmp_path / "run", **options, mirror_timeout=0.2)
    assert ckpt.restore(dict(STATE)) == 1
    assert ckpt.save(2, STATE).result(30) == "committed"
    with pytest.raises(asyncckpt.StorageError):
        ckpt.close()


def test_what_another_has_committed_there_is_not_replaced(tmp_path):
    """Two nodes, one mirror: the second was not known when the first was opened."""
    (tmp_path / "mirror").mkdir()
    options = {"mirror": tmp_path / "mirror", "writer": "thread", "mirror_timeout": 0.2}
    with asyncckpt.Checkpointer(tmp_path / "run", **options) as ckpt:
        ckpt.save(1, STATE)
    lock = RunLock.acquire(str(tmp_path / "mirror"), 0.0)
    ckpt = asyncckpt.Checkpointer(tmp_path / "run", **options)
    commit(LocalStorage(str(tmp_path / "mirror")), 2, small(2), sequence=2)
    lock.release()
    handle = ckpt.save(2, STATE)
    with pytest.raises(asyncckpt.ConflictError, match="another writer has committed step 2"):
        handle.wait_mirrored(30)
    with pytest.raises(asyncckpt.ConflictError):
        ckpt.close()
    assert "note" in asyncckpt.load(tmp_path / "mirror", 2)


def test_what_was_read_there_is_not_trusted_here(tmp_path):
    options = {"mirror": tmp_path / "mirror", "writer": "thread"}
    with asyncckpt.Checkpointer(tmp_path / "run", **options) as ckpt:
        ckpt.save(1, STATE)
        ckpt.save(2, STATE)
    flip(next((tmp_path / "run" / "step-00000002").glob("*/x.safetensors")), 4096)
    with asyncckpt.Checkpointer(tmp_path / "run", **options) as ckpt:
        trusted = []
        ckpt._session.trust = trusted.append
        with pytest.warns(UserWarning, match="step 2 is read from"):
            assert ckpt.restore(dict(STATE)) == 2
        assert trusted == []
        assert ckpt.restore(dict(STATE), 1) == 1
        assert trusted == [1]
