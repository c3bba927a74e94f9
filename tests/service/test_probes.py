"""Probes for a notice to leave: a file, an HTTP endpoint, a function."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from support.processes import PATIENCE, until
from support.torch_states import run

import asyncckpt
from asyncckpt import Preemption

RARELY = asyncckpt.Every(steps=10**6)


class Metadata:
    """An HTTP endpoint on loopback, which answers what it is told to."""

    def __init__(self):
        self.answer, self.requests = (404, b""), []
        metadata = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                metadata.requests.append((self.path, self.headers.get("Metadata-Flavor")))
                code, body = metadata.answer
                self.send_response(code)
                self.send_header("Content-Length", str(len(body)))
                if code == 302:
                    self.send_header("Location", "/elsewhere")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/preempted?token=sesame"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def asked(self):
        """Wait until it has been asked twice more: the first of these answers has been judged then."""
        count = len(self.requests)
        until(lambda: len(self.requests) >= count + 2)

    def close(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def metadata():
    metadata = Metadata()
    yield metadata
    metadata.close()


def probing(folder, probe, **options):
    return run(folder, cadence=RARELY, preempt=Preemption(signals=(), probe=probe, poll=0.01, **options))


@pytest.mark.parametrize("answer", [b"TRUE", b'{"action": "terminate", "time": "2030-01-01T00:00:00Z"}'])
def test_an_http_endpoint(answer, metadata, tmp_path, caplog):
    with probing(tmp_path / "run", metadata.url, headers={"Metadata-Flavor": "Google"}) as ckpt:
        no = [(404, b"not found"), (200, b"FALSE"), (200, b"none\n"), (200, b""), (500, b"TRUE"), (302, b"TRUE")]
        for metadata.answer in no:
            metadata.asked()
            assert not ckpt.should_save(1), metadata.answer
        metadata.answer = (200, answer)
        until(lambda: ckpt.should_save(1))
        assert ckpt.maybe_save(3, {"x": 3}) is not None
    assert ckpt.steps() == [3]
    assert set(metadata.requests) == {("/preempted?token=sesame", "Google")}
    assert "sesame" not in caplog.text and "Google" not in caplog.text
    notice = f"notice of a preemption (probe http://127.0.0.1:{metadata.server.server_port}/preempted)"
    until(lambda: notice in caplog.text)


def test_an_endpoint_that_cannot_be_asked_is_told_once_and_asked_on(metadata, tmp_path, caplog):
    metadata.answer = (401, b"")
    with probing(tmp_path / "run", metadata.url) as ckpt:
        for _ in range(4):
            metadata.asked()
        assert caplog.text.count("can't be asked: it answers 401") == 1
        metadata.answer = (200, b"TRUE")
        until(lambda: ckpt.should_save(1))


def test_a_file_that_appears(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with probing(tmp_path / "run", "notice") as ckpt:
        monkeypatch.chdir("/")
        assert not ckpt.should_save(1)
        (tmp_path / "notice").touch()
        until(lambda: ckpt.should_save(1))
        assert ckpt.maybe_save(3, {"x": 3}) is not None
    assert ckpt.steps() == [3]


def test_a_function_is_asked_off_the_training_thread(tmp_path, caplog):
    answers = iter([False, RuntimeError("planted"), RuntimeError("again"), 0, 1])
    threads = set()

    def looks_bad():
        threads.add(threading.current_thread())
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with probing(tmp_path / "run", looks_bad) as ckpt:
        until(lambda: ckpt.should_save(1))
    assert threading.current_thread() not in threads and len(threads) == 1
    assert caplog.text.count("can't be asked") == 1 and "planted" in caplog.text
    assert list(answers) == []


def test_a_probe_may_be_used_from_any_thread(tmp_path):
    done = []

    def train():
        with probing(tmp_path / "run", lambda: True) as ckpt:
            until(lambda: ckpt.should_save(1))
            done.append(ckpt.maybe_save(1, {"x": 1}).result(PATIENCE))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join(PATIENCE)
    assert done == ["committed"]


def test_no_probe_is_looked_at_after_close(tmp_path):
    looks = []
    with probing(tmp_path / "run", lambda: looks.append(1)):
        until(lambda: looks)
    until(lambda: "asyncckpt-probe" not in {thread.name for thread in threading.enumerate()})
