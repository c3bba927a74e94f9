"""The services of several ranks, without their trainers."""

import time

import numpy as np
from support.checkpoints import image_of

import asyncckpt
from asyncckpt.policy.keep import Keep
from asyncckpt.testing import RanksDriver


def value(step):
    return {"model": (image_of({"w": np.full(5000, step, np.float32)})[1], step)}


def test_what_retention_lets_go_at_once_is_committed_for_all(tmp_path):
    """Of a training that went back: the others may look for the manifest when it is gone already."""
    begun = time.monotonic()
    with RanksDriver(str(tmp_path / "run"), keep=Keep(last=1), patience=60.0) as driver:
        for step in (9, 10, *range(1, 9)):
            driver.save(step, value(step))
    assert time.monotonic() - begun < 30
    assert asyncckpt.open(tmp_path / "run").steps() == [10]
