"""What all tests share. This folder is on the import path of the tests, so that they find `support`."""

import os

# Before torch is loaded, here and in the processes that tests start: its OpenMP threads neither survive a fork nor
# share two cores with another test process.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from support.processes import Trainer

settings.register_profile(
    "asyncckpt", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("asyncckpt")

_unpickled: list[str] = []


def _watch(event: str, args: tuple[Any, ...]) -> None:
    """Note what is unpickled below a call of asyncckpt; what tests unpickle themselves is theirs."""
    if event != "pickle.find_class":
        return
    frame = sys._getframe()
    while frame := frame.f_back:
        if frame.f_globals.get("__name__", "").partition(".")[0] == "asyncckpt":
            _unpickled.append(f"{args} at {frame.f_code.co_filename}:{frame.f_lineno}")
            return


sys.addaudithook(_watch)


@pytest.fixture(autouse=True)
def nothing_is_unpickled() -> Iterator[None]:
    """No test may see asyncckpt unpickle anything."""
    _unpickled.clear()
    yield
    assert not _unpickled


@pytest.fixture
def start() -> Iterator[Callable[..., Trainer]]:
    """Starts trainers: see `Trainer`. Those that still run at the end are killed."""
    started: list[Trainer] = []

    def start(source: str, *arguments: object) -> Trainer:
        started.append(Trainer(source, *arguments))
        return started[-1]

    yield start
    for trainer in started:
        trainer.close()
