"""An exception anywhere inside `save` (a signal handler of the user's raises one) leaves nothing that hangs."""

from __future__ import annotations

import itertools
import sys

import pytest
from support.models import same, train_step, training, weights
from support.processes import PATIENCE

import asyncckpt

WITHIN = {"asyncckpt.checkpointer", "asyncckpt.session", "asyncckpt.link", "asyncckpt.write.client",
          "asyncckpt.schedule", "asyncckpt.snapshot.arena"}  # fmt: skip
"""Where the sweep strikes. Not in `threading`: a lock whose release is interrupted stays held, by no fault of ours."""
ENTER_AND_EXIT = {"__enter__", "__exit__"}
"""Of a lock: Python runs no handler between the call and what it does."""
NOT_AGAIN = {"_copied", "_land", "abandon"}
"""What clears up."""


class Interrupt(BaseException):
    pass


class Strike:
    """Raises at the n-th call, in Python or C, before it or after it, that the modules above make within `save`, from
    the moment on in which it asks for a place in the queue."""

    def __init__(self, at: int) -> None:
        self.left = at
        self.asked = False

    def __enter__(self) -> Strike:
        sys.setprofile(self)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def __call__(self, frame, event, argument):
        if frame.f_globals.get("__name__") not in WITHIN or getattr(argument, "__name__", "") in ENTER_AND_EXIT:
            return
        names = set()
        walk = frame
        while walk is not None:
            names.add(walk.f_code.co_name)
            walk = walk.f_back
        self.asked = self.asked or "admit" in names
        if not self.asked or "save" not in names or names & NOT_AGAIN:
            return
        self.left -= 1
        if self.left == 0:
            raise Interrupt


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("writer", ["process", "thread"])
def test_wherever_a_save_is_interrupted_the_next_one_is_made(writer, overlap, tmp_path):
    state = training(width=8, layers=1)
    options = {"writer": writer, "overlap": overlap, "keep": asyncckpt.Keep(last=2), "max_in_flight": 1}
    with asyncckpt.Checkpointer(tmp_path / "run", **options) as ckpt:
        interrupted = 0
        for step in itertools.count(1):
            try:
                with Strike(step) as strike:
                    ckpt.save(2 * step, state)
            except Interrupt:
                interrupted += 1
            else:
                assert strike.left > 0, "the interrupt was swallowed"
                break
            ckpt.wait_until_flushed(PATIENCE)
            train_step(state)
            assert ckpt.save(2 * step + 1, state).result(PATIENCE) == "committed"
            assert ckpt.stats().in_flight == 0
    assert interrupted > 20
    expected, loaded = weights(state), training(width=8, layers=1)
    assert asyncckpt.restore(tmp_path / "run", loaded) == 2 * step
    assert same(weights(loaded), expected)
