"""A run in a directory, mirrored to an object store: what `tests/mirror` shows of directories, where it may differ."""

import shutil

import pytest
import torch
from support.models import same, train_step, training, weights
from support.processes import PATIENCE

import asyncckpt


def tensors(loaded):
    """Those of the model."""
    return list(loaded["model"].values())


@pytest.mark.parametrize("codec", ["raw", "delta"])
def test_a_new_machine_goes_on_from_the_store_alone(tmp_path, server, new_url, codec):
    url, options = new_url(), server.options()

    def open_run():
        return asyncckpt.Checkpointer(
            tmp_path / "run", codec=codec, mirror=url, mirror_options=options, mirror_keep=asyncckpt.Keep(last=2)
        )

    state = training(width=64)
    with open_run() as ckpt:
        for step in (1, 2, 3):
            assert ckpt.save(step, state).wait_mirrored(PATIENCE) == "mirrored"
            train_step(state)
        expected = tensors(asyncckpt.load(tmp_path / "run", 3))
    there = asyncckpt.open(url, storage_options=options)
    assert there.steps() == [2, 3]
    assert there.verify(2) == 2 and there.verify(3) == 3
    assert same(tensors(there.load(3)), expected)

    shutil.rmtree(tmp_path / "run")
    fresh = training(width=64, seed=1)
    with open_run() as ckpt:
        assert ckpt.restore(fresh) == 3
        assert same(weights(fresh), expected)
        with pytest.raises(asyncckpt.CheckpointExistsError):
            ckpt.save(3, fresh)
        ckpt.save(4, fresh)
        ckpt.wait_until_flushed(PATIENCE, tier="mirror")
    assert there.steps() == [3, 4]


def test_a_store_that_refuses_harms_no_save_and_names_no_secret(tmp_path, server, new_url, caplog):
    url, wrong = new_url(), server.options(secret_access_key="CANARYwrong")
    with pytest.raises(asyncckpt.StorageError) as told:
        asyncckpt.Checkpointer(tmp_path / "run", mirror=url, mirror_options=wrong)
    with asyncckpt.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, {"x": torch.arange(3)})
    ckpt = asyncckpt.Checkpointer(tmp_path / "run", mirror=url, mirror_options=wrong)
    handle = ckpt.save(2, {"x": torch.arange(3)})
    assert handle.result(PATIENCE) == "committed"
    with pytest.raises(asyncckpt.StorageError) as failed:
        handle.wait_mirrored(PATIENCE)
    with pytest.raises(asyncckpt.StorageError):
        ckpt.close()
    manifest = (tmp_path / "run" / "step-00000002" / "manifest.json").read_text()
    for text in (str(told.value), str(failed.value), caplog.text, repr(ckpt), manifest):
        assert "CANARY" not in text


def test_only_a_run_in_a_directory_is_mirrored(tmp_path):
    with pytest.raises(ValueError, match="only a run in a directory"):
        asyncckpt.Checkpointer("s3://bucket/run", mirror=tmp_path)
    with pytest.raises(ValueError, match="of a mirror"):
        asyncckpt.Checkpointer(tmp_path, mirror_options={"region": "x"})
