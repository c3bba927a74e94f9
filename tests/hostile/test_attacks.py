"""Each attack is refused with an error of ours, in some way of reading at least, and harms nothing in any."""

from pathlib import Path

import pytest

from hostile.attacks import ATTACKS
from hostile.forge import Forgery
from hostile.judge import judge

REFUSALS = {"CorruptCheckpointError", "StorageError", "StateMismatchError", "UnsupportedStateError",
            "CheckpointNotFoundError"}  # fmt: skip


@pytest.mark.parametrize("part", ["model", "optimizer", "extra"])
def test_a_forgery_that_stores_a_part_coded_is_good(forgery: Forgery, tmp_path: Path, part: str) -> None:
    """What is refused below is refused for what was changed."""
    forgery.code(part)
    assert {piece[0] for chunk in forgery.record["parts"][part]["coded"] for piece in chunk} >= {"zstd", "delta"}
    root = tmp_path / "run"
    root.mkdir()
    forgery.write(root)
    assert set(judge(root)) == {"ok"}


@pytest.mark.timeout(10)
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused(forgery: Forgery, tmp_path: Path, name: str) -> None:
    ATTACKS[name](forgery)
    root = tmp_path / "run"
    root.mkdir()
    forgery.write(root)
    assert set(judge(root)) & REFUSALS
