"""One real checkpoint for all, and what is left of it to forge."""

import copy

import pytest

from hostile.forge import Forgery, commit
from hostile.judge import judge


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Forgery:
    """A checkpoint taken apart; to be copied, not changed."""
    root = tmp_path_factory.mktemp("original")
    commit(root)
    assert set(judge(root, watched=False)) == {"ok"}  # what is imported and opened on first use is so now
    return Forgery.of(root)


@pytest.fixture
def forgery(original: Forgery) -> Forgery:
    return copy.deepcopy(original)
