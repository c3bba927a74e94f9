"""What is committed comes to the mirror, whole, in the background; a mirror that fails harms no save."""

import logging
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from support.checkpoints import flip, snapshot
from support.models import same, train_step, training, weights
from support.processes import PATIENCE, until

import asyncckpt
from asyncckpt.testing import PosixWrapper, RecordingPosix

STATE = {"x": torch.arange(10)}


def open_run(tmp_path, **options):
    return asyncckpt.Checkpointer(
        tmp_path / "run", **{"mirror": tmp_path / "mirror", "writer": "thread", "overlap": False, **options}
    )


def save(ckpt, *steps, state=STATE, **options):
    handles = [ckpt.save(step, state, **options) for step in steps]
    assert [handle.result(PATIENCE) for handle in handles] == ["committed"] * len(steps)
    return handles


def steps(path):
    return asyncckpt.open(path).steps()


def step_folders(path):
    return {key: value for key, value in snapshot(path).items() if key.startswith("step-")}


def a_file(path, step):
    """A data file of `step`, with a tensor in it."""
    return next(path.glob(f"step-{step:08d}/*/*.safetensors"))


@pytest.mark.parametrize("writer", ["process", "thread"])
@pytest.mark.parametrize("codec", ["raw", "zstd", "delta"])
def test_the_mirror_holds_the_same_bytes_under_the_same_names(tmp_path, writer, codec):
    state = training(width=256)
    with open_run(tmp_path, writer=writer, codec=codec) as ckpt:
        for step in (1, 2, 3):
            (handle,) = save(ckpt, step, state=state, metrics={"loss": 1.0})
            assert handle.wait_mirrored(PATIENCE) == handle.mirror == "mirrored"
            assert asyncckpt.open(tmp_path / "mirror").verify() == step
            train_step(state)
        ckpt.pin(2)
        ckpt.annotate(1, {"late": 2.0})
        ckpt.wait_until_flushed(PATIENCE, tier="mirror")
        told = ckpt.stats().mirror
        assert (told.step, told.steps, told.backlog, told.passed_over, told.error) == (3, 3, 0, 0, "")
        assert told.bytes >= 3 * sum(p.numel() * 4 for p in state["model"].parameters()) / 2
    assert step_folders(tmp_path / "run") == step_folders(tmp_path / "mirror")
    loaded = asyncckpt.load(tmp_path / "mirror", 1)
    assert loaded["model"].keys() == state["model"].state_dict().keys()
    if codec != "raw":  # what does not change is not sent again
        links = [os.stat(path).st_nlink for path in (tmp_path / "mirror").glob("step-00000003/*/*.still")]
        assert links == [os.stat(path).st_nlink for path in (tmp_path / "run").glob("step-00000003/*/*.still")]


def test_each_tier_has_a_retention_of_its_own(tmp_path):
    kept = asyncckpt.Keep(last=3)
    with open_run(tmp_path, keep=asyncckpt.Keep(last=1), mirror_keep=kept, mirror_required=True) as ckpt:
        for step in range(1, 6):
            save(ckpt, step)[0].wait_mirrored(PATIENCE)
    assert steps(tmp_path / "run") == [5]
    assert steps(tmp_path / "mirror") == [3, 4, 5]
    with open_run(tmp_path, keep=asyncckpt.Keep(last=1), mirror_keep=kept) as ckpt:
        assert ckpt.steps() == [3, 4, 5]
        ckpt.wait_until_flushed(PATIENCE, tier="mirror")
        assert ckpt.stats().mirror.steps == 0


def mirrored_in_order(posix, mirror):
    """The steps whose manifests were published in `mirror`."""
    links = [op.arguments[1] for op in posix.operations if op.verb == "link" and op.error is None]
    return [int(Path(path).parent.name[5:]) for path in links if path.startswith(str(mirror))]


def test_the_newest_goes_first(tmp_path, occupied):
    posix = RecordingPosix()
    with open_run(tmp_path, _posix=posix) as ckpt:
        save(ckpt, 1, 2, 3, 4)
        assert ckpt.stats().mirror.backlog == 4
        occupied()
    assert mirrored_in_order(posix, tmp_path / "mirror") == [4, 3, 2, 1]
    assert steps(tmp_path / "mirror") == [1, 2, 3, 4]


def test_what_the_mirror_would_not_keep_is_passed_over(tmp_path, occupied):
    posix = RecordingPosix()
    with open_run(tmp_path, mirror_keep=asyncckpt.Keep(last=1, every=2), _posix=posix) as ckpt:
        handles = save(ckpt, 1, 2, 3, 4, 5)
        ckpt.pin(1)
        occupied()
        outcomes = [handle.wait_mirrored(PATIENCE) for handle in handles]
        assert outcomes == ["mirrored", "mirrored", "passed over", "mirrored", "mirrored"]
        assert ckpt.stats().mirror.passed_over == 1
    assert mirrored_in_order(posix, tmp_path / "mirror") == [5, 4, 2, 1]


def test_a_step_that_is_required_stays_until_it_is_mirrored(tmp_path, occupied):
    with open_run(tmp_path, keep=asyncckpt.Keep(last=1), mirror_required=True) as ckpt:
        save(ckpt, 1, 2, 3)
        assert steps(tmp_path / "run") == [1, 2, 3]
        occupied()
        ckpt.wait_until_flushed(PATIENCE, tier="mirror")
        assert steps(tmp_path / "mirror") == [1, 2, 3]
        until(lambda: steps(tmp_path / "run") == [3])


def test_without_it_the_mirror_keeps_nothing_from_retention(tmp_path, occupied):
    with open_run(tmp_path, keep=asyncckpt.Keep(last=1)) as ckpt:
        first, *_ = save(ckpt, 1, 2, 3)
        until(lambda: steps(tmp_path / "run") == [3])
        occupied()
        assert first.wait_mirrored(PATIENCE) == "passed over"
    assert steps(tmp_path / "mirror") == [3]


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_bytes_that_have_rotted_here_are_not_spread(tmp_path, occupied, codec):
    with open_run(tmp_path, codec=codec) as ckpt:
        (first,) = save(ckpt, 1, state={"x": torch.randn(5000)})
        (second,) = save(ckpt, 2, state={"x": torch.randn(5000)})
        damaged = next((tmp_path / "run" / "step-00000001").glob("*/x.*"))
        flip(damaged, 5000)
        occupied()
        with pytest.raises(asyncckpt.CorruptCheckpointError, match="step 1"):
            first.wait_mirrored(PATIENCE)
        assert second.wait_mirrored(PATIENCE) == "mirrored"
        assert steps(tmp_path / "mirror") == [2]
        ckpt.save(1, {"x": torch.randn(5000)}, overwrite=True).wait_mirrored(PATIENCE)
        assert steps(tmp_path / "mirror") == [1, 2]


def test_who_did_not_ask_is_told_of_a_damaged_step_at_the_end(tmp_path, occupied):
    ckpt = open_run(tmp_path)
    save(ckpt, 1)
    flip(a_file(tmp_path / "run", 1), 4096)
    occupied()
    with pytest.raises(asyncckpt.CorruptCheckpointError):
        ckpt.close()


def test_a_rewind_comes_before_what_is_committed_after_it(tmp_path):
    with open_run(tmp_path) as ckpt:
        save(ckpt, 10, 20, 30)
        ckpt.restore(dict(STATE), 10, rewind=True)
        ckpt.wait_until_flushed(PATIENCE, tier="mirror")
        assert steps(tmp_path / "mirror") == [10]
        save(ckpt, 20, state={"x": torch.ones(3)})[0].wait_mirrored(PATIENCE)
        assert steps(tmp_path / "mirror") == [10, 20]
    assert asyncckpt.load(tmp_path / "mirror")["x"].tolist() == [1, 1, 1]


def test_deleted_is_deleted_on_both(tmp_path):
    with open_run(tmp_path, keep=asyncckpt.Keep(last=1)) as ckpt:
        save(ckpt, 1)[0].wait_mirrored(PATIENCE)
        save(ckpt, 2)[0].wait_mirrored(PATIENCE)
        assert ckpt.steps() == [1, 2]
        ckpt.delete(1)  # here it is retired already
        ckpt.delete(2)
        assert ckpt.steps() == steps(tmp_path / "mirror") == []
        with pytest.raises(asyncckpt.CheckpointNotFoundError):
            ckpt.delete(2)


def test_saved_again_it_is_mirrored_again(tmp_path):
    with open_run(tmp_path) as ckpt:
        save(ckpt, 1)[0].wait_mirrored(PATIENCE)
        save(ckpt, 1, state={"x": torch.ones(3)}, overwrite=True)[0].wait_mirrored(PATIENCE)
    assert step_folders(tmp_path / "run") == step_folders(tmp_path / "mirror")


def test_no_more_bytes_a_second_than_allowed(tmp_path):
    state = {f"part{i}": torch.randn(1 << 18) for i in range(5)}  # 1 MiB each
    with open_run(tmp_path, mirror_bandwidth=10 << 20) as ckpt:
        (handle,) = save(ckpt, 1, state=state)
        committed = time.monotonic()
        assert handle.wait_mirrored(PATIENCE) == "mirrored"
        assert time.monotonic() - committed > 0.3  # 4 MiB, and one that goes first; some time went before this began


def test_a_mirror_that_fails_harms_no_save_and_is_told(tmp_path, caplog):
    with asyncckpt.Checkpointer(tmp_path / "run", writer="thread") as ckpt:
        save(ckpt, 0)
    (tmp_path / "mirror").write_text("no directory")
    ckpt = open_run(tmp_path)
    with caplog.at_level(logging.WARNING):
        (handle,) = save(ckpt, 1)
        with pytest.raises(asyncckpt.StorageError, match="mirror"):
            handle.wait_mirrored(PATIENCE)
        with pytest.raises(asyncckpt.StorageError, match="mirror"):
            ckpt.wait_until_flushed(PATIENCE, tier="mirror")
        save(ckpt, 2)
        assert str(tmp_path / "mirror") in ckpt.stats().mirror.error
        assert ckpt.stats().mirror.backlog == 2  # of this service; of what was there before it does not know yet
    assert sum("mirroring to" in r.getMessage() for r in caplog.records) == 1
    (tmp_path / "mirror").unlink()
    assert handle.wait_mirrored(PATIENCE) == "mirrored"
    ckpt.close()
    assert steps(tmp_path / "mirror") == [0, 1, 2]


class Hanging(PosixWrapper):
    """Writes below `place` do not return until `go` is set."""

    def __init__(self, place):
        super().__init__()
        self.place, self.go, self.reached = str(place), threading.Event(), threading.Event()
        self.fds = set()

    def around(self, verb, arguments, call):
        if verb == "pwrite" and arguments[0] in self.fds:
            self.reached.set()
            self.go.wait()
        result = call(*arguments)
        if verb == "create" and arguments[0].startswith(self.place):
            self.fds.add(result)
        return result


def test_a_mirror_that_hangs_stops_no_save_and_no_exit(tmp_path):
    posix = Hanging(tmp_path / "mirror")
    ckpt = open_run(tmp_path, _posix=posix, mirror_timeout=0.5)
    (handle,) = save(ckpt, 1)
    assert posix.reached.wait(PATIENCE)
    with pytest.raises(TimeoutError, match="not mirrored"):
        ckpt.wait_until_flushed(0.01, tier="mirror")
    save(ckpt, 2, 3, 4)
    with pytest.raises(asyncckpt.StorageError, match="slow or hung"):
        handle.wait_mirrored(PATIENCE)
    with pytest.raises(asyncckpt.StorageError, match="slow or hung"):
        ckpt.close()
    assert steps(tmp_path / "run") == [1, 2, 3, 4]
    posix.go.set()
    with open_run(tmp_path) as ckpt:  # what was left, the next one does
        ckpt.wait_until_flushed(PATIENCE, tier="mirror")
    assert steps(tmp_path / "mirror") == [1, 2, 3, 4]


def test_a_mirror_of_another_writer_is_waited_for_no_longer_than_allowed(tmp_path, occupied):
    ckpt = open_run(tmp_path, mirror_timeout=0.3)
    (handle,) = save(ckpt, 1)
    with pytest.raises(asyncckpt.ConflictError, match="mirror"):
        handle.wait_mirrored(PATIENCE)
    occupied()
    assert handle.wait_mirrored(PATIENCE) == "mirrored"
    ckpt.close()


def test_arguments(tmp_path):
    with pytest.raises(ValueError, match="give mirror="):
        asyncckpt.Checkpointer(tmp_path / "run", mirror_keep=asyncckpt.Keep())
    with pytest.raises(ValueError, match="another"):
        asyncckpt.Checkpointer(tmp_path / "run", mirror=str(tmp_path / "." / "run"))
    with pytest.raises(TypeError, match="Keep"):
        open_run(tmp_path, mirror_keep=lambda records: [])
    with pytest.raises(ValueError, match="mirror_bandwidth"):
        open_run(tmp_path, mirror_bandwidth=0)
    with asyncckpt.Checkpointer(tmp_path / "run", writer="thread") as ckpt:
        with pytest.raises(ValueError, match="no mirror="):
            ckpt.wait_until_flushed(tier="mirror")
        with pytest.raises(asyncckpt.NotSupportedError, match="mirror="):
            save(ckpt, 1)[0].wait_mirrored(PATIENCE)
        assert ckpt.stats().mirror is None


def test_a_training_goes_on_from_the_mirror_alone(tmp_path):
    state = training()
    with open_run(tmp_path) as ckpt:
        save(ckpt, 1, state=state)
        train_step(state)
        save(ckpt, 2, state=state)
    (tmp_path / "run").rename(tmp_path / "lost")
    fresh = training(seed=1)
    with open_run(tmp_path) as ckpt:
        assert ckpt.latest() == 2
        assert ckpt.restore(fresh) == 2
        assert same(weights(fresh), weights(state))
        with pytest.raises(asyncckpt.CheckpointExistsError):
            ckpt.save(2, fresh)
        save(ckpt, 3, state=fresh)
        assert ckpt.steps() == [1, 2, 3]
    run, mirror = asyncckpt.open(tmp_path / "run"), asyncckpt.open(tmp_path / "mirror")
    assert run.steps() == [3] and mirror.steps() == [1, 2, 3]
    assert [r.sequence for r in mirror.records()] == [1, 2, 3]
