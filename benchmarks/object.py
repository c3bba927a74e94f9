"""Uploads to an S3 server on loopback, by library: `python -m benchmarks.object`.

Each library saves the same state from a fresh process, in turn, while a training of matrix products goes on or while
nothing else does: how fast the bytes get there, what a step costs meanwhile, and what memory it takes. Beside them
stands obstore, putting bytes that lie ready (in a copy of the state, which counts as its memory). The server runs on
the same cores, so that it costs each of them something: on loopback the numbers say who stands in the way, not what a
network gives.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import child
from benchmarks.child import ChildError, Record
from benchmarks.memory import Sampler
from benchmarks.spread import Spread, spread

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.seaweed import BUCKET, KEY, SECRET, shared

_RESULTS = Path(__file__).resolve().parent / "results" / "object.jsonl"
_TENSOR = 16 << 20
"""Bytes of each tensor of the state."""


def _state(size: int) -> dict[str, Any]:
    import torch

    return {f"t{i}": torch.randn(_TENSOR // 4) for i in range(max(1, size // _TENSOR))}


class _Obstore:
    """Bytes that lie ready, put as one multipart upload: what the client can do."""

    def __init__(self, state: dict[str, Any], url: str, port: int) -> None:
        import obstore
        import torch

        self._put, part = obstore.put, 8 << 20
        data = torch.cat(list(state.values())).view(torch.uint8).numpy()
        self._parts = [memoryview(data)[i : i + part] for i in range(0, len(data), part)]
        options = {"access_key_id": KEY, "secret_access_key": SECRET, "endpoint": f"http://127.0.0.1:{port}"}
        client = {"allow_http": True, "timeout": "10m"}
        self._store = obstore.store.from_url(url, region="us-east-1", client_options=client, **options)

    def save(self, step: int) -> None:
        chunk = {"chunk_size": 8 << 20, "max_concurrency": 8}
        self._put(self._store, f"{step}", iter(self._parts), use_multipart=True, **chunk)


class _Asyncckpt:
    def __init__(self, state: dict[str, Any], url: str, port: int) -> None:
        import asyncckpt

        options = {"access_key_id": KEY, "secret_access_key": SECRET, "endpoint": f"http://127.0.0.1:{port}"}
        options |= {"region": "us-east-1", "client_options": {"allow_http": True}}
        self._state = {"state": state}
        self._ckpt = asyncckpt.Checkpointer(url, storage_options=options, keep=asyncckpt.Keep(last=1), overlap=False)
        self._ckpt.prepare(self._state)

    def save(self, step: int) -> None:
        self._ckpt.save(step, self._state).result(600)

    def close(self) -> None:
        self._ckpt.close()


class _Boto3:
    """torch.save into memory, then boto3's managed upload, as its documentation tells."""

    def __init__(self, state: dict[str, Any], url: str, port: int) -> None:
        import boto3

        self._state, self._prefix = state, url.partition(f"{BUCKET}/")[2]
        keys = {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET}
        self._client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1", **keys)

    def save(self, step: int) -> None:
        import io

        import torch

        file = io.BytesIO()
        torch.save(self._state, file)
        file.seek(0)
        self._client.upload_fileobj(file, BUCKET, f"{self._prefix}/{step}")


class _S3TorchConnector:
    """DCP with the storage writer of s3torchconnector."""

    def __init__(self, state: dict[str, Any], url: str, port: int) -> None:
        from s3torchconnector import S3ClientConfig
        from s3torchconnector.dcp import S3StorageWriter

        os.environ |= {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "S3_ENDPOINT_URL": ""}
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
        config = S3ClientConfig(force_path_style=True)
        self._state = state
        self._writer: Callable[[int], Any] = lambda step: S3StorageWriter(
            region="us-east-1", path=f"{url}/{step}/", s3client_config=config
        )

    def save(self, step: int) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.save(self._state, storage_writer=self._writer(step), no_dist=True)


PEERS: dict[str, Callable[..., Any]] = {
    "obstore": _Obstore,
    "asyncckpt": _Asyncckpt,
    "boto3": _Boto3,
    "s3torchconnector": _S3TorchConnector,
}


def measure(tell: Callable[..., None], peer: str, size: int, saves: int, port: int, url: str) -> None:
    """Runs in a child: tells the seconds of each save alone and of those beside a training, and of the steps."""
    import torch

    torch.set_num_threads(1)
    state = _state(size)
    total = sum(tensor.nbytes for tensor in state.values())
    sampler = Sampler(os.getpid())
    matrix = torch.randn(512, 512)

    def step() -> float:
        begun = time.perf_counter()
        for _ in range(8):
            matrix @ matrix
        return time.perf_counter() - begun

    sampler.phase("before")
    quiet = [step() for _ in range(200)]
    made = PEERS[peer](state, url, port)
    made.save(0)  # connections, arenas, imports
    sampler.phase("saving")
    alone, beside, steps = [], [], []
    for number in range(saves):
        begun = time.perf_counter()
        made.save(2 * number + 1)
        alone.append(time.perf_counter() - begun)
        with ThreadPoolExecutor(1) as pool:
            begun = time.perf_counter()
            saving = pool.submit(made.save, 2 * number + 2)
            while not saving.done():
                steps.append(step())
            saving.result()
            beside.append(time.perf_counter() - begun)
    sampler.close()
    memory = sampler.peaks["saving"] - sampler.peaks["before"]
    getattr(made, "close", lambda: None)()
    tell(kind="object", peer=peer, bytes=total, alone=alone, beside=beside, steps=steps, quiet=quiet, memory=memory)


def _table(found: list[Record]) -> Table:
    head = ["library", "upload, alone", "beside a training", "a step meanwhile", "memory beside the state"]
    table = Table(*head, title="The same state to an S3 server on loopback (medians, 95 % intervals)")
    for record in found:
        if "error" in record:
            table.add_row(record["peer"], f"error: {record['error']}")
            continue
        size, quiet = record["bytes"], spread(record["quiet"])
        assert quiet is not None
        table.add_row(
            record["peer"],
            _rate(spread([size / t for t in record["alone"]])),
            _rate(spread([size / t for t in record["beside"]])),
            _times(spread([t / quiet.median for t in record["steps"]])),
            f"{record['memory'] / size:.2f}x the state",
        )
    return table


def _rate(value: Spread | None) -> str:
    return f"{value.median / 1e6:.0f} MB/s [{value.low / 1e6:.0f}, {value.high / 1e6:.0f}]" if value else "-"


def _times(value: Spread | None) -> str:
    return f"{value.median:.2f}x [{value.low:.2f}, {value.high:.2f}], p95 {value.p95:.1f}x" if value else "-"


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.object", description=__doc__)
    parser.add_argument("--size", type=int, help="bytes of the state (1 GB; with --quick 64 MB)")
    parser.add_argument("--saves", type=int, help="of each kind in each round (3; with --quick 2)")
    parser.add_argument("--rounds", type=int, help="fresh processes of each library, in turn (4; with --quick 1)")
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--limit", type=float, default=600.0, help="seconds that one process may take")
    parser.add_argument("--quick", action="store_true", help="small and short; its results are not kept")
    parser.add_argument("--directory", type=Path, default=Path(), help="where the server keeps its data")
    arguments = parser.parse_args()
    quick = arguments.quick
    size, saves = arguments.size or (64 << 20 if quick else 1 << 30), arguments.saves or (2 if quick else 3)
    found: dict[str, Record] = {}
    for turn in range(arguments.rounds or (1 if quick else 4)):
        for peer in arguments.peers[:: -1 if turn % 2 else 1]:
            print(f"round {turn + 1}: {peer}", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(prefix=".bench-", dir=arguments.directory) as folder:
                _add(found, _measured(peer, size, saves, arguments.limit, Path(folder).resolve()))
    records = [found[peer] for peer in arguments.peers]
    if not quick:
        _RESULTS.parent.mkdir(exist_ok=True)
        _RESULTS.write_text("".join(json.dumps(record) + "\n" for record in records))
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(_table(records))


def _measured(peer: str, size: int, saves: int, limit: float, folder: Path) -> Record:
    """What a fresh process tells, at a fresh server."""
    with shared(folder) as server:
        options = {"size": size, "saves": saves, "port": server.port, "url": f"s3://{BUCKET}/{peer}"}
        try:
            (record,) = child.run("object", limit, peer=peer, **options)
        except ChildError as error:
            return {"kind": "object", "peer": peer, "error": str(error)}
        return record


def _add(found: dict[str, Record], record: Record) -> None:
    """Another round of a library: samples are put together, and of memory the most counts."""
    known = found.setdefault(record["peer"], record)
    if known is record or "error" in known:
        return
    if "error" in record:
        found[record["peer"]] = record
        return
    for name in ("alone", "beside", "steps", "quiet"):
        known[name] += record[name]
    known["memory"] = max(known["memory"], record["memory"])


if __name__ == "__main__":
    main()
