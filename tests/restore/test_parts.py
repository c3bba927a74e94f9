"""Checkpoints that have only some parts of the state: what they say of themselves, and who takes them."""

import torch
from support.models import train_step, training
from support.torch_states import copies_held, run

import asyncckpt


def test_a_manifest_says_which_parts_of_the_state_it_has(tmp_path):
    state = training()
    with run(tmp_path) as ckpt:
        ckpt.save(1, state)
        ckpt.save(2, state, parts=["model", "rng"])
        ckpt.save(3, state, parts=list(state))
        ckpt.save(4, {"model": state["model"]})
    assert [(r.step, r.parts, r.complete) for r in asyncckpt.open(tmp_path).records()] == [
        (1, ("model", "optimizer", "rng"), True),
        (2, ("model", "rng"), False),
        (3, ("model", "optimizer", "rng"), True),
        (4, ("model",), True),
    ]


def test_retention_counts_complete_checkpoints(tmp_path):
    state = training()
    with run(tmp_path, keep=asyncckpt.Keep(last=1)) as ckpt:
        for step in range(1, 9):
            ckpt.save(step, state, parts=["model"] if step % 4 else None)
    assert asyncckpt.open(tmp_path).steps() == [8]
    with run(tmp_path, keep=asyncckpt.Keep(last=1)) as ckpt:
        for step in range(9, 12):
            ckpt.save(step, state, parts=["model"])
    assert asyncckpt.open(tmp_path).steps() == [8, 11]


def test_what_an_optimizer_owns_is_copied_late_though_the_optimizer_is_not_saved(tmp_path):
    state = training()
    with run(tmp_path, overlap=True) as ckpt:
        ckpt.save(1, state).result(30)
        before = [p.detach().clone() for p in state["model"].parameters()]
        with copies_held(ckpt):
            handle = ckpt.save(2, state, parts=["model"])
            assert not handle.wait_staged(0), "all was copied before save returned"
            train_step(state)
        handle.result(30)
    saved = asyncckpt.load(tmp_path, 2, parts=["model"])["model"]
    assert all(torch.equal(a, b) for a, b in zip(before, saved.values(), strict=True))
