"""Checkpoints changed at random places and sealed again are read, or refused by an error of ours; nothing else."""

import copy
import random
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from hostile.forge import Forgery, clear
from hostile.judge import judge
from hostile.mutate import mutate


def test_a_forgery_without_a_change_is_read(forgery: Forgery, tmp_path: Path) -> None:
    forgery.write(tmp_path)
    assert judge(tmp_path) == ["ok"] * 8


@settings(max_examples=100)
@given(seed=st.integers(0, 2**64 - 1))
def test_a_changed_checkpoint_is_read_or_refused(original: Forgery, tmp_path: Path, seed: int) -> None:
    forgery = copy.deepcopy(original)
    mutate(forgery, random.Random(seed))
    clear(tmp_path)
    forgery.write(tmp_path)
    judge(tmp_path)
