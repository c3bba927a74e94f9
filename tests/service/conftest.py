import pytest
from support.processes import Trainer


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
