"""A real S3 server on loopback, with credentials and conditional writes enforced: SeaweedFS.

One for all tests of a run, the workers of pytest-xdist too: the first that needs it starts it, the last that ends stops
it, by SIGKILL of its process group.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

KEY, SECRET, BUCKET = "testaccesskey", "CANARYofthesecretkey0123", "ckpt"
_READY = 30.0
_started: list[subprocess.Popen[bytes]] = []
"""Those that this process has started, which may be stopped by another."""


@dataclass(frozen=True)
class Server:
    """Where it listens."""

    port: int

    def options(self, port: int | None = None, **more: Any) -> dict[str, Any]:
        """Storage options for it, or for a proxy of it at `port`; requests end and are tried again soon."""
        return {
            "access_key_id": KEY,
            "secret_access_key": SECRET,
            "region": "us-east-1",
            "endpoint": f"http://127.0.0.1:{port or self.port}",
            "client_options": {"allow_http": True, "timeout": 20, "connect_timeout": 2},
            "retry_config": {
                "max_retries": 10,
                "retry_timeout": 20,
                "backoff": {"init_backoff": 0.005, "max_backoff": 0.05},
            },
        } | more


def program() -> str | None:
    """Where it is installed; None where it is not."""
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed")


@contextlib.contextmanager
def shared(folder: Path) -> Iterator[Server]:
    """The server of all that share `folder`."""
    state = folder / "seaweed.json"
    with _locked(folder):
        known = json.loads(state.read_text()) if state.exists() else None
        if known is None:
            known = _start(folder)
        known["users"] += 1
        state.write_text(json.dumps(known))
    try:
        yield Server(known["port"])
    finally:
        with _locked(folder):
            known = json.loads(state.read_text())
            known["users"] -= 1
            state.write_text(json.dumps(known))
            if not known["users"]:
                state.unlink()
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(known["group"], signal.SIGKILL)
                for process in _started:
                    process.wait(_READY)
                shutil.rmtree(folder / known["data"], ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with open(folder / "seaweed.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _start(folder: Path) -> dict[str, Any]:
    """Start one, at ports that are free, and wait until it answers."""
    weed = program()
    assert weed is not None
    for _ in range(5):
        s3, *others = _free_ports(4)
        data = folder / f"seaweed-{s3}"
        data.mkdir()
        ports = [f"-{name}.port={port}" for name, port in zip(("master", "volume", "filer"), others, strict=True)]
        off = ["-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        address = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.port={s3}", *ports]
        with open(data / "log", "wb") as log:
            process = subprocess.Popen(
                [weed, "mini", f"-dir={data}", *address, f"-bucket={BUCKET}", *off],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET},
                start_new_session=True,
                cwd=data,
            )
        _started.append(process)
        if _answers(s3, process):
            return {"port": s3, "group": process.pid, "users": 0, "data": data.name}
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    raise RuntimeError(f"SeaweedFS does not start; see {data}/log")


def _free_ports(count: int) -> list[int]:
    """Ports whose gRPC neighbour, 10,000 above, is free too."""
    found: list[int] = []
    candidate = 20_000 + os.getpid() * 7 % 11_000
    while len(found) < count:
        candidate = candidate + 1 if candidate < 32_000 else 20_000
        if _is_free(candidate) and _is_free(candidate + 10_000):
            found.append(candidate)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _answers(port: int, process: subprocess.Popen[bytes]) -> bool:
    """Wait until the bucket is there."""
    import obstore

    options = Server(port).options(client_options={"allow_http": True, "timeout": "2s"})
    options["retry_config"] = {"max_retries": 0, "retry_timeout": timedelta(seconds=1)}
    store = obstore.store.from_url(f"s3://{BUCKET}", **options)
    deadline = time.monotonic() + _READY
    while time.monotonic() < deadline and process.poll() is None:
        try:
            obstore.list_with_delimiter(store)
            obstore.put(store, "ready", b"")
        except (obstore.exceptions.BaseError, OSError):
            time.sleep(0.05)
        else:
            return True
    return False
