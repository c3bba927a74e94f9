"""What an object store does when requests fail, and what of it may be seen."""

import gc
import logging
import mmap
import threading
import traceback

import pytest
from support.faulty_proxy import FaultyProxy
from support.processes import until
from support.seaweed import SECRET, Server

from asyncckpt.catalog.catalog import Catalog
from asyncckpt.errors import ConflictError, StorageError
from asyncckpt.format import names
from asyncckpt.link import Options
from asyncckpt.storage import upload
from asyncckpt.storage.object import ObjectStorage
from asyncckpt.storage.places import open_storage
from asyncckpt.storage.urls import StorageOptions
from asyncckpt.write import messages as m

pytest.importorskip("obstore")
PART = upload.PART
KEY = "step-00000007/0123456789ab/model.safetensors"
MANIFEST = "step-00000007/manifest.json"
QUICK = {"max_retries": 2, "retry_timeout": 1, "backoff": {"init_backoff": 0.005, "max_backoff": 0.01}}


@pytest.fixture
def proxy(server: Server):
    with FaultyProxy(server.port) as proxy:
        yield proxy


@pytest.fixture
def faulty(server: Server, proxy: FaultyProxy, new_url) -> ObjectStorage:
    """Behind the proxy; a request is given up within about a second."""
    return ObjectStorage(new_url(), StorageOptions.of(server.options(proxy.port, retry_config=QUICK)))


def memory(size: int) -> memoryview:
    found = memoryview(mmap.mmap(-1, size))
    for start in range(0, size, 1 << 20):
        found[start] = start >> 20 & 255
    return found


def upload_parts(storage: ObjectStorage, data: memoryview, steady: bool = True) -> None:
    file = storage.create(KEY, len(data), steady=steady)
    try:
        for start in range(0, len(data), PART):
            file.write_at(start, data[start : start + PART])
        file.finish()
    finally:
        file.abort()


def whole(storage: ObjectStorage, key: str) -> bytes:
    file = storage.open(key)
    buffer = bytearray(file.size)
    assert file.read_into(0, memoryview(buffer)) == file.size
    return bytes(buffer)


# Uploads


@pytest.mark.parametrize("steady", [True, False])
def test_parts_go_out_while_others_are_still_to_come(faulty: ObjectStorage, proxy: FaultyProxy, steady: bool):
    data = memory(3 * PART + 10)
    file = faulty.create(KEY, len(data) if steady else 0, steady=steady)
    for start in (0, PART, 2 * PART):
        file.write_at(start, data[start : start + PART])
    until(lambda: len(proxy.of_kind("part")) >= (2 if steady else 1))
    file.write_at(3 * PART, data[3 * PART :])
    file.finish(len(data))
    assert whole(faulty, KEY) == bytes(data)


def test_memory_that_stays_as_it_is_is_not_copied(faulty: ObjectStorage, proxy: FaultyProxy):
    """What has not gone out yet is sent as it is then: the caller promised not to change it."""
    go = threading.Event()

    def hold_back(request):
        assert go.wait(30)

    proxy.choose = hold_back
    data = memory(4 * PART)
    threading.Timer(0.3, go.set).start()
    upload_parts(faulty, data)
    gc.collect()
    assert whole(faulty, KEY) == bytes(data)


def test_memory_that_changes_is_copied_before_write_at_returns(faulty: ObjectStorage, proxy: FaultyProxy):
    buffer, expected = memory(PART), bytearray()
    file = faulty.create(KEY, 0)
    for number in range(4):
        buffer[:] = bytes([65 + number]) * PART
        file.write_at(number * PART, buffer)
        expected += buffer
    buffer[:] = bytes(PART)
    file.finish(4 * PART)
    assert whole(faulty, KEY) == expected


@pytest.mark.parametrize("fault", ["500", "503", "reset", "lost", "reset after", "twice"])
def test_a_part_that_fails_is_sent_again(faulty: ObjectStorage, proxy: FaultyProxy, fault: str):
    failed = []

    def once(request):
        if request.kind == "part" and "partNumber=2" in request.query and not failed:
            failed.append(request)
            return fault
        return None

    proxy.choose = once
    data = memory(3 * PART)
    upload_parts(faulty, data)
    assert failed
    assert whole(faulty, KEY) == bytes(data)


def test_a_part_that_stalls_times_out_and_is_sent_again(server: Server, proxy: FaultyProxy, new_url):
    client = {"allow_http": True, "timeout": "1s"}
    storage = ObjectStorage(new_url(), StorageOptions.of(server.options(proxy.port, client_options=client)))
    stalled = []

    def once(request):
        if request.kind == "part" and not stalled:
            stalled.append(request)
            return "stall"
        return None

    proxy.choose = once
    data = memory(3 * PART)
    upload_parts(storage, data)
    assert whole(storage, KEY) == bytes(data)


def test_an_upload_that_fails_names_key_part_and_cause_and_leaves_nothing(faulty: ObjectStorage, proxy: FaultyProxy):
    proxy.choose = lambda request: "503" if "partNumber=2" in request.query else None
    with pytest.raises(StorageError) as caught:
        upload_parts(faulty, memory(3 * PART))
    assert caught.value.retryable
    for word in (KEY, "part 2", "503", "SlowDown", "after 2 retries"):
        assert word in str(caught.value)
    assert proxy.of_kind("abort")
    assert faulty.list("step-00000007/0123456789ab") == []


def test_an_upload_that_is_given_up_leaves_nothing(faulty: ObjectStorage, proxy: FaultyProxy):
    data = memory(3 * PART)
    file = faulty.create(KEY, 5 * PART, steady=True)
    for start in range(0, 3 * PART, PART):
        file.write_at(start, data[start : start + PART])
    file.abort()
    until(lambda: proxy.of_kind("abort") or proxy.of_kind("delete"))
    until(lambda: faulty.list("step-00000007/0123456789ab") == [])


def test_a_server_that_dies_in_the_middle_is_an_error_within_the_deadline(faulty: ObjectStorage, proxy: FaultyProxy):
    proxy.choose = lambda request: "die" if "partNumber=2" in request.query else None
    with pytest.raises(StorageError) as caught:
        upload_parts(faulty, memory(4 * PART))
    assert caught.value.retryable


# Publishing


@pytest.mark.parametrize(
    "fault", ["500", "503", "409", "412", "reset", "lost", "500 after", "reset after", "twice", "cut"]
)
@pytest.mark.parametrize("replace", [False, True])
def test_a_publication_is_exact_whatever_becomes_of_its_answer(faulty, proxy: FaultyProxy, fault: str, replace: bool):
    if replace:
        faulty.publish(MANIFEST, b"old", replace=False)
    failed = []

    def once(request):
        if request.conditional and not failed:
            failed.append(request)
            return fault
        return None

    proxy.choose = once
    faulty.publish(MANIFEST, b"new", replace=replace)
    assert failed
    assert faulty.read(MANIFEST, 10) == b"new"


def test_a_publication_that_never_gets_an_answer_is_an_error(faulty: ObjectStorage, proxy: FaultyProxy, monkeypatch):
    monkeypatch.setattr(faulty._cloud, "patience", 0.5)
    proxy.choose = lambda request: "reset" if request.conditional else None
    with pytest.raises(StorageError, match="not known") as caught:
        faulty.publish(MANIFEST, b"new", replace=False)
    assert caught.value.retryable


def test_what_another_published_meanwhile_stays(faulty: ObjectStorage, proxy: FaultyProxy, server: Server):
    faulty.publish(MANIFEST, b"old", replace=False)
    other = ObjectStorage(faulty.url, StorageOptions.of(server.options()))
    come = []

    def before_it_is_put(request):
        if request.conditional and not come:
            come.append(request)
            other.publish(MANIFEST, b"other", replace=True)

    proxy.choose = before_it_is_put
    with pytest.raises(ConflictError):
        faulty.publish(MANIFEST, b"new", replace=True)
    assert faulty.read(MANIFEST, 10) == b"other"


def test_of_updates_at_the_same_time_none_is_lost(storage: ObjectStorage):
    start = threading.Barrier(4)

    def add(letter: bytes) -> None:
        start.wait(10)
        for _ in range(5):
            storage.update(MANIFEST, 100, lambda data: (data or b"") + letter)

    threads = [threading.Thread(target=add, args=[letter]) for letter in (b"a", b"b", b"c", b"d")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(storage.read(MANIFEST, 100)) == sorted(b"abcd" * 5)


# What can't be


def test_a_missing_bucket_is_an_error_and_not_an_empty_run(faulty: ObjectStorage, proxy: FaultyProxy):
    proxy.choose = lambda request: "404"
    for act in (lambda: faulty.list(""), lambda: Catalog(faulty).candidates(), lambda: faulty.read(MANIFEST, 10)):
        with pytest.raises(StorageError, match="NoSuchBucket"):
            act()


def test_a_store_that_cannot_be_reached_is_no_damage(faulty: ObjectStorage, proxy: FaultyProxy):
    """It says nothing of the checkpoints: no older one may be taken in their place."""
    faulty.publish(MANIFEST, b"{}", replace=False)
    proxy.choose = lambda request: "reset" if request.key == names.MANIFEST else None
    with pytest.raises(StorageError):
        Catalog(faulty).records()


@pytest.mark.parametrize(
    "url", ["ftp://x/y", "s3://", "s3://key:CANARY@bucket/run", "s3://bucket/run?sig=CANARY", "http://x/y"]
)
def test_urls_that_name_no_run(url: str):
    with pytest.raises(ValueError) as caught:
        open_storage(url)
    assert "CANARY" not in str(caught.value)


def test_a_file_url_is_a_directory(tmp_path):
    assert open_storage(f"file://{tmp_path}/a%20b").url == f"{tmp_path}/a b"
    with pytest.raises(ValueError, match="names the host"):
        open_storage("file://elsewhere/run")
    with pytest.raises(ValueError, match="storage_options"):
        open_storage(str(tmp_path), StorageOptions.of({"region": "x"}))


# Secrets


def test_no_secret_is_shown(server: Server, new_url, caplog):
    canary = "CANARYofawrongkey" + SECRET
    wrong = server.options(secret_access_key=canary, session_token="CANARYtoken")
    options = StorageOptions.of(wrong)
    storage = ObjectStorage(new_url(), options)
    texts = [repr(options), repr(storage), repr(storage._cloud), repr(m.Open("s3://b/r", 1.0, options=options))]
    texts.append(repr(Options("s3://b/r", None, 1.0, process=True, storage=options)))
    with caplog.at_level(logging.DEBUG):
        for act in (
            lambda: storage.list(""),
            lambda: storage.put(KEY, b"x"),
            lambda: storage.publish(MANIFEST, b"x", replace=False),
            lambda: upload_parts(storage, memory(2 * PART)),
        ):
            with pytest.raises(StorageError) as caught:
                act()
            assert not caught.value.retryable
            texts += traceback.format_exception(caught.value)
            texts.append(repr(m.Fault.of(caught.value)))
    with pytest.raises(StorageError) as caught:
        ObjectStorage("s3://b/r", StorageOptions.of({"no_such_option": canary}))
    texts += traceback.format_exception(caught.value)
    with pytest.raises(TypeError) as refused:
        StorageOptions.of({"credential_provider": lambda: "CANARY"})
    texts += traceback.format_exception_only(refused.value)
    assert not [text for text in [*texts, *caplog.messages] if "CANARY" in text]
