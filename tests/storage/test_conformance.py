"""Every storage, and every wrapper around the verbs, keeps the contract."""

import errno

import pytest

from asyncckpt.storage.local import LocalStorage
from asyncckpt.testing import VERBS, FaultyPosix, RecordingPosix
from asyncckpt.testing.suite import StorageSuite


class TestDirect(StorageSuite):
    @pytest.fixture
    def storage(self, tmp_path):
        return LocalStorage(str(tmp_path / "new/run"))


class TestBuffered(StorageSuite):
    @pytest.fixture
    def storage(self, tmp_path):
        return LocalStorage(str(tmp_path / "run"), direct=False)


class TestRecorded(StorageSuite):
    @pytest.fixture
    def storage(self, tmp_path):
        return LocalStorage(str(tmp_path / "run"), RecordingPosix(looks=True))


class TestFaultsThatNeverCome(StorageSuite):
    @pytest.fixture
    def storage(self, tmp_path):
        posix = FaultyPosix(RecordingPosix())
        for verb in VERBS:
            posix.fail(verb, 1_000_000, errno.EIO)
        yield LocalStorage(str(tmp_path / "run"), posix)
        assert posix.fired == 0


class TestShortWritesAndReads(StorageSuite):
    """A kernel may take or give fewer bytes than it was asked for, every time."""

    @pytest.fixture
    def storage(self, tmp_path):
        posix = FaultyPosix().shorten(None, "pwrite").shorten(None, "preadv")
        return LocalStorage(str(tmp_path / "run"), posix)
