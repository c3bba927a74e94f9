"""Each attack is refused with an error of ours, in some way of reading at least, and harms nothing in any."""

from pathlib import Path

import pytest

from hostile.attacks import ATTACKS
from hostile.forge import Forgery
from hostile.judge import judge

REFUSALS = {"CorruptCheckpointError", "StorageError", "StateMismatchError", "UnsupportedStateError",
            "CheckpointNotFoundError"}  # fmt: skip


@pytest.mark.timeout(10)
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused(forgery: Forgery, tmp_path: Path, name: str) -> None:
    ATTACKS[name](forgery)
    root = tmp_path / "run"
    root.mkdir()
    forgery.write(root)
    assert set(judge(root)) & REFUSALS
