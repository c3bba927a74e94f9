import pytest

from asyncckpt.catalog.ownership import RunLock


@pytest.fixture
def occupied(tmp_path):
    """The mirror belongs to another writer until this is called: nothing is mirrored before."""
    (tmp_path / "mirror").mkdir()
    lock = RunLock.acquire(str(tmp_path / "mirror"), 0.0)
    yield lock.release
    lock.release()
