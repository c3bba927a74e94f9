"""The outcome on an object store is exact, whatever becomes of requests and answers.

Promise 19. A life of a run passes a proxy that answers wrongly, late, twice or not at all: nothing is reported that is
not there, and nobody is told of a conflict where there is none.
"""

from __future__ import annotations

import os

import pytest
from support.faulty_proxy import FaultyProxy
from support.object_schedules import live
from support.seaweed import Server

from asyncckpt.storage import cloud, upload
from asyncckpt.storage import object as object_storage
from asyncckpt.storage.urls import StorageOptions

TORTURE = int(os.environ.get("ASYNCCKPT_TORTURE", "0"))
LIVES = max(16, 30 * TORTURE)


@pytest.fixture(autouse=True)
def small_parts_and_short_waits(monkeypatch):
    monkeypatch.setattr(upload, "PART", 5 << 20)
    monkeypatch.setattr(object_storage, "_LAST_WAIT", 0.05)
    monkeypatch.setattr(cloud, "_FIRST_WAIT", 0.005)


@pytest.mark.timeout(120 + 5 * LIVES)
def test_lives_behind_a_faulty_proxy(server: Server, new_url):
    with FaultyProxy(server.port) as proxy:
        real, faulty = StorageOptions.of(server.options()), StorageOptions.of(server.options(proxy.port))
        verdicts = {seed: live(proxy, new_url(), real, faulty, seed) for seed in range(LIVES)}
    wrong = {seed: verdict.wrong for seed, verdict in verdicts.items() if verdict.wrong}
    saved, failed = sum(v.saved for v in verdicts.values()), sum(v.failed for v in verdicts.values())
    faults = sum(len(v.faults) for v in verdicts.values())
    print(f"{LIVES} lives, {faults} faults, {saved} saves reported, {failed} told to have failed")
    assert not wrong
    assert faults > 2 * LIVES
    assert saved > 8 * failed


def test_without_reading_back_there_are_false_conflicts(server: Server, new_url, monkeypatch):
    """The planted bug: to believe the store's first no."""
    monkeypatch.setattr(object_storage.ObjectStorage, "_peek", lambda self, key, data: (False, {"e_tag": "other"}))
    with FaultyProxy(server.port) as proxy:
        real, faulty = StorageOptions.of(server.options()), StorageOptions.of(server.options(proxy.port))
        found = (live(proxy, new_url(), real, faulty, seed).wrong for seed in range(40))
        assert any("false conflict" in wrong for wrongs in found for wrong in wrongs)


def test_an_error_taken_for_success_is_a_false_success(server: Server, new_url, monkeypatch):
    """The planted bug: a put whose answer did not come is believed to have come through."""

    def hopeful(self, key, data, *, replace):
        try:
            self._api.put(self._store, key, data, use_multipart=False)
        except self._api.exceptions.BaseError:
            pass

    monkeypatch.setattr(object_storage.ObjectStorage, "publish", hopeful)
    never = {"max_retries": 0, "retry_timeout": 5}
    with FaultyProxy(server.port) as proxy:
        real = StorageOptions.of(server.options())
        faulty = StorageOptions.of(server.options(proxy.port, retry_config=never))
        choose = lambda request: "reset" if request.key == "manifest.json" and request.method == "PUT" else None  # noqa: E731
        verdict = live(proxy, new_url(), real, faulty, 1, choose)
    assert any("were reported and are not there" in wrong for wrong in verdict.wrong)
