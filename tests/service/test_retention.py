"""What goes after a commit, seen from the training: pins, late metrics, policies of the user's own."""

import logging
import os
import queue
import signal
import threading

import pytest
import torch
from support.processes import PATIENCE, wait_for_end

import asyncckpt

STATE = {"x": torch.arange(10)}


def save(ckpt, *steps, **options):
    for step in steps:
        assert ckpt.save(step, STATE, **options).result(PATIENCE) == "committed"


@pytest.fixture(params=["process", "thread"])
def run(tmp_path, request):
    """Opens a run of its own; its options are those of the Checkpointer."""
    return lambda **options: asyncckpt.Checkpointer(tmp_path / "run", **{"writer": request.param, **options})


def steps(tmp_path):
    return asyncckpt.open(tmp_path / "run").steps()


def test_a_pin_holds_whoever_sets_it(run, tmp_path):
    with run(keep=asyncckpt.Keep(last=1)) as ckpt:
        save(ckpt, 1)
        ckpt.pin(1)
        save(ckpt, 2)
        asyncckpt.open(tmp_path / "run").pin(2)
        save(ckpt, 3, 4)
        with pytest.raises(asyncckpt.CheckpointBusyError, match="pinned"):
            ckpt.delete(1)
        assert [r.pinned for r in ckpt.records() if r.step < 3] == [True, True]
    assert steps(tmp_path) == [1, 2, 4]
    with run(keep=asyncckpt.Keep(last=1)) as ckpt:
        ckpt.unpin(1)
        save(ckpt, 5)
    assert steps(tmp_path) == [2, 5]


def test_a_metric_may_come_later(run, tmp_path):
    with run(keep=asyncckpt.Keep(last=1, best=1, metric="loss")) as ckpt:
        save(ckpt, 1, 2, 3)
        ckpt.annotate(1, {"loss": 2.0})
        ckpt.annotate(2, {"loss": torch.tensor(1.0)})
        ckpt.annotate(3, {"loss": float("nan")})
        save(ckpt, 4, metrics={"loss": float("inf")})
        save(ckpt, 5, metrics={"loss": 3.0})
    assert steps(tmp_path) == [2, 5]


def test_only_what_is_committed_can_be_pinned_or_annotated(run):
    with run() as ckpt:
        for act in (ckpt.pin, ckpt.unpin, lambda step: ckpt.annotate(step, {"loss": 1.0})):
            with pytest.raises(asyncckpt.CheckpointNotFoundError, match="step 1"):
                act(1)
        save(ckpt, 1)
        for wrong in ("0.5", b"1", None, [1.0], {}):
            with pytest.raises(TypeError, match="give a number"):
                ckpt.annotate(1, {"loss": wrong})
            with pytest.raises(TypeError, match="give a number"):
                ckpt.save(2, STATE, metrics={"loss": wrong})
        assert ckpt.records()[0].metrics == {}


def test_a_metric_that_a_save_lacks_is_told_once_and_deletes_nothing(run, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "asyncckpt")
    with run(keep=asyncckpt.Keep(last=1, best=1, metric="los")) as ckpt:
        save(ckpt, 1, 2, 3, metrics={"loss": 1.0})
    assert steps(tmp_path) == [1, 2, 3]
    (told,) = [record.getMessage() for record in caplog.records if "'los'" in record.getMessage()]
    assert "loss" in told and "annotate" in told


def test_a_pinned_step_of_a_branch_that_was_left_is_not_saved_over(run):
    with run() as ckpt:
        save(ckpt, 1, 2, 3)
        ckpt.pin(2)
        assert ckpt.restore(dict(STATE), 1, rewind=True) == 1
        save(ckpt, 3)
        with pytest.raises(asyncckpt.CheckpointExistsError, match=r"pinned.*overwrite=True"):
            ckpt.save(2, STATE)
        save(ckpt, 2, overwrite=True)


@pytest.mark.parametrize("wrong", [3, "last", asyncckpt.Keep, [1]])
def test_a_policy_that_is_none_is_refused(wrong, tmp_path):
    with pytest.raises(TypeError, match="keep="):
        asyncckpt.Checkpointer(tmp_path / "run", keep=wrong)


# Policies of the user's own


def test_a_function_decides_here_and_may_take_its_time(run, tmp_path):
    seen, go = [], threading.Event()

    def policy(records):
        seen.append((os.getpid(), threading.current_thread(), [r.step for r in records]))
        assert go.wait(PATIENCE)
        return [r.step for r in records if r.metrics["loss"] > 1]

    with run(keep=policy) as ckpt:
        for step in range(6):
            save(ckpt, step, metrics={"loss": step % 3})  # none of them waits for the policy
        assert len(seen) == 1
        go.set()
    assert steps(tmp_path) == [0, 1, 3, 4, 5]
    assert {pid for pid, _, _ in seen} == {os.getpid()}
    assert threading.main_thread() not in {thread for _, thread, _ in seen}
    assert seen[-1][2] == [0, 1, 2, 3, 4, 5] or seen[-1][2] == [0, 1, 3, 4, 5]


def test_a_function_cannot_delete_the_newest_or_what_is_pinned(run, tmp_path):
    with run(keep=lambda records: [r.step for r in records]) as ckpt:
        save(ckpt, 1)
        ckpt.pin(1)
        save(ckpt, 2, 3)
    assert steps(tmp_path) == [1, 3]


def test_what_was_saved_anew_since_the_question_stays(run, tmp_path):
    asked, go = threading.Event(), threading.Event()

    def policy(records):
        asked.set()
        assert go.wait(PATIENCE)
        return [] if len(records) > 2 else [1]

    with run() as ckpt:
        save(ckpt, 1)
    with run(keep=policy) as ckpt:
        save(ckpt, 2)
        assert asked.wait(PATIENCE)
        save(ckpt, 1, overwrite=True)
        save(ckpt, 3)
        go.set()
    assert steps(tmp_path) == [1, 2, 3]


def raising(records):
    raise ZeroDivisionError("oh")


BAD = {"raises": (raising, "ZeroDivisionError: oh"), "names a step it was not given": (lambda _: [77], "77")}
BAD |= {"gives text": (lambda _: ["1"], "AttributeError|TypeError"), "gives nothing": (lambda _: None, "TypeError")}


@pytest.mark.parametrize("how", BAD)
def test_a_function_that_fails_deletes_nothing_and_is_told(how, run, tmp_path):
    policy, says = BAD[how]
    with pytest.raises(asyncckpt.CheckpointError, match=f"nothing was deleted.*({says})"), run(keep=policy) as ckpt:
        save(ckpt, 1)
    with run(keep=policy, on_error="warn") as ckpt:
        assert ckpt.save(2, STATE).result(PATIENCE) == "committed"
        with pytest.raises(asyncckpt.CheckpointError, match="nothing was deleted"):
            ckpt.close()
    assert steps(tmp_path) == [1, 2]


def test_its_failure_is_raised_by_the_next_save_and_the_one_after_works(run, tmp_path):
    asked = queue.SimpleQueue()

    def policy(records):
        asked.put(threading.current_thread())
        if len(records) == 1:
            raise ZeroDivisionError("oh")
        return []

    with run(keep=policy) as ckpt:
        save(ckpt, 1)
        asked.get(timeout=PATIENCE).join(PATIENCE)
        with pytest.raises(asyncckpt.CheckpointError, match="nothing was deleted") as caught:
            ckpt.save(2, STATE)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        save(ckpt, 2)
    assert steps(tmp_path) == [1, 2]


TRAINER = """
import sys, torch, asyncckpt

def policy(records):
    print("asked", ckpt.stats().writer_pid, flush=True)
    sys.stdin.read()

ckpt = asyncckpt.Checkpointer(sys.argv[1], keep=policy)
ckpt.save(2, {"x": torch.arange(10)}).result(60)
sys.stdin.read()
"""


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="processes are watched by pidfd")
def test_a_trainer_that_is_gone_deletes_nothing_and_its_writer_ends(tmp_path, start):
    with asyncckpt.Checkpointer(tmp_path / "run") as ckpt:
        save(ckpt, 1)
    trainer = start(TRAINER, tmp_path / "run")
    word, writer = trainer.read_line().split()
    assert word == "asked"
    trainer.kill(signal.SIGKILL)
    trainer.end()
    wait_for_end(int(writer))
    assert steps(tmp_path) == [1, 2]
