"""Object stores keep the contract of a storage: one in memory, and a real server."""

import pytest

from asyncckpt.testing.suite import StorageSuite

pytest.importorskip("obstore")


class TestObjectStorage(StorageSuite):
    """The fixture `storage` is of both kinds."""
