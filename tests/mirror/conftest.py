import pytest
from support.processes import Trainer

from asyncckpt.catalog.ownership import RunLock


@pytest.fixture
def start():
    """Starts trainers: see `Trainer`. Those that still run at the end are killed."""
    started = []

    def start(source, *arguments):
        started.append(Trainer(source, *arguments))
        return started[-1]

    yield start
    for trainer in started:
        trainer.close()


@pytest.fixture
def occupied(tmp_path):
    """The mirror belongs to another writer until this is called: nothing is mirrored before."""
    (tmp_path / "mirror").mkdir()
    lock = RunLock.acquire(str(tmp_path / "mirror"), 0.0)
    yield lock.release
    lock.release()
