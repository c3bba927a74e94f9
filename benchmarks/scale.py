"""What the coordinator has to do for a save of many ranks, on paper: `python -m benchmarks.scale`.

The real code that decides who stores what, that commits, and that reads the records back, in a process of its own for
each number of ranks; what the other ranks would send or write is made up. There is no network here, and no data: the
bytes of the state are only spoken of.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from asyncckpt.catalog.catalog import Catalog
from asyncckpt.distributed.decide import Decider
from asyncckpt.distributed.offers import Item, Loose, Offer, Verdict
from asyncckpt.format import names
from asyncckpt.format.image import Spec, layout
from asyncckpt.format.manifest import CHUNK_SIZE, Chunk, digest
from asyncckpt.format.ranks import RankRecord, SharePart, StoredShard, encode_rank_record
from asyncckpt.read.reader import CheckpointReader
from asyncckpt.storage.local import LocalStorage
from asyncckpt.testing import PosixWrapper, ServiceDriver
from asyncckpt.write.messages import Member
from benchmarks import machine
from benchmarks.child import ROOT

WORLDS = (16, 256, 4096, 65536)
STATE = 405 * 10**9 * 14
"""Bytes: 405 billion parameters in bf16, with a copy and two moments in fp32."""
GROUP = 128
"""Ranks that a tensor is spread over, or all, where there are fewer."""
_COLUMNS = 256
_RESULTS = Path(__file__).resolve().parent / "results" / "scale.jsonl"
_LIMIT = 900.0
_T = TypeVar("_T")


class Counting(PosixWrapper):
    """Counts the calls of each verb."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def around(self, verb: str, arguments: tuple[Any, ...], call: Callable[..., Any]) -> Any:
        self.calls[verb] += 1
        return super().around(verb, arguments, call)


class World:
    """`world` ranks. All but rank 0 have shards of tensors, about `shards` together, of a state of `STATE` bytes."""

    def __init__(self, world: int, shards: int) -> None:
        self.world = world
        self.each = max(1, shards // (world - 1))

    def shards(self, rank: int) -> dict[str, StoredShard]:
        """Of each tensor of the rank's group one row."""
        if rank == 0:
            return {}
        group, row = divmod(rank - 1, GROUP)
        shape = min(GROUP, self.world - 1 - group * GROUP), _COLUMNS
        return {
            f"layers.{group}.{i}.weight": StoredShard("F32", shape, (row, 0), (1, _COLUMNS)) for i in range(self.each)
        }

    def offer(self, rank: int, known: str = "") -> Offer:
        """What the rank brings to a save; all it has, unless the others know it by its version."""
        items = [
            Item("model", name, shard.dtype, shard.shape, shard.offset, shard.size, lowest=False)
            for name, shard in self.shards(rank).items()
        ]
        tree = digest(f"tree {rank // GROUP}".encode())
        return Offer(
            plan=digest(msgspec.msgpack.encode(items)),
            version=known,
            items=None if known else items,
            parts=["model", "rng"],
            trees={"model": tree, "rng": tree},
            samples={"model": digest(b"")},
            loose={"rng": {"cpu": Loose(digest(f"rng {rank}".encode()), 5056)}},
        )

    def record(self, rank: int, attempt: str) -> bytes:
        """Its prepare record, with chunk tables as long as its share of the state demands."""
        size = STATE // self.world // CHUNK_SIZE * CHUNK_SIZE + CHUNK_SIZE
        chunk = Chunk("raw", CHUNK_SIZE, digest(rank.to_bytes(4)))
        share = SharePart(
            msgspec.Raw(b"null"),
            names.image_file("model", rank),
            size,
            CHUNK_SIZE,
            [chunk] * (size // CHUNK_SIZE),
            same=True,
            shards=self.shards(rank),
        )
        return encode_rank_record(RankRecord(1, attempt, rank, self.world, {"model": share}))


def timed(call: Callable[[], _T]) -> tuple[float, _T]:
    begun = time.perf_counter()
    found = call()
    return time.perf_counter() - begun, found


def decide(world: World) -> dict[str, Any]:
    """Two saves, as rank 0's trainer decides on them: at the second nothing has changed."""
    decider = Decider()
    first, version = _decide(world, decider, "")
    later, _ = _decide(world, decider, version)
    return {"first": first, "later": later}


def _decide(world: World, decider: Decider, known: str) -> tuple[dict[str, Any], str]:
    sent = [msgspec.msgpack.encode(world.offer(rank, known)) for rank in range(world.world)]

    def once() -> Verdict:
        return decider.decide([msgspec.msgpack.decode(body, type=Offer) for body in sent], names.new_attempt())

    seconds, verdict = timed(once)
    size = len(msgspec.msgpack.encode(verdict))
    return {"seconds": seconds, "received": sum(map(len, sent)), "verdict": size}, verdict.version


def image() -> bytes:
    """A small one, for rank 0."""
    return layout([Spec("w", "F32", (1024,), 4)]).header + bytes(4096)


def commit(world: World, folder: str) -> dict[str, Any]:
    """One save, as rank 0's writer commits it when all others are prepared."""
    posix, attempt = Counting(), names.new_attempt()
    with ServiceDriver(folder, posix) as driver:
        driver.reserve(1, attempt)
        LocalStorage(folder).begin(f"{names.step_name(1)}/{attempt}")
        place = Path(folder) / names.step_name(1) / attempt
        written = 0
        for rank in range(1, world.world):
            written += (place / names.rank_record(rank)).write_bytes(world.record(rank, attempt))
        posix.calls.clear()
        member = Member(0, world.world, attempt, _LIMIT)
        value = {"model": (image(), {"w": {"$": "tensor", "n": "w"}})}
        seconds, _ = timed(lambda: driver.finish(driver.begin(1, value, member=member)))
        calls = dict(posix.calls)
    manifest = (place.parent / names.MANIFEST).stat().st_size
    reading, _ = timed(lambda: CheckpointReader(Catalog(LocalStorage(folder)), 1).close())
    return {"seconds": seconds, "records": written, "manifest": manifest, "calls": calls, "open": reading}


def measure(world: int, shards: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=ROOT) as folder:
        made = World(world, shards)
        found = {
            "world": world,
            "shards": made.each * (world - 1),
            "decide": decide(made),
            "commit": commit(made, folder),
        }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    return {**found, "peak": peak}


def show(found: dict[str, Any]) -> str:
    first, later, commit = found["decide"]["first"], found["decide"]["later"], found["commit"]
    cells = [
        f"{found['world']:,}",
        f"{first['seconds']:.2f} s, {first['received'] / 1e6:.1f} MB, {first['verdict'] / 1e6:.2f} MB",
        f"{later['seconds']:.3f} s, {later['received'] / 1e6:.2f} MB, {later['verdict'] / 1e6:.2f} MB",
        f"{commit['seconds']:.2f} s",
        f"{sum(commit['calls'].values()):,}",
        f"{commit['records'] / 1e6:.1f} MB",
        f"{commit['manifest'] / 1e6:.2f} MB",
        f"{commit['open']:.2f} s",
        f"{found['peak'] / 1e9:.2f} GB",
    ]
    return f"| {' | '.join(cells)} |"


_TITLES = (
    "ranks",
    "first save: decide, offers, verdict",
    "later saves",
    "commit",
    "storage calls",
    "prepare records",
    "manifest",
    "open to read",
    "peak memory",
)
HEAD = f"| {' | '.join(_TITLES)} |\n{'|---' * len(_TITLES)}|"


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--worlds", type=int, nargs="+", default=WORLDS)
    parser.add_argument("--shards", type=int, default=10**6, help="shards of tensors, of all ranks together")
    parser.add_argument("--quick", action="store_true", help="16 ranks, 1,000 shards; nothing is written to results/")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.worlds[0], arguments.shards)))
        return
    worlds, shards = ([16], 1000) if arguments.quick else (arguments.worlds, arguments.shards)
    lines = [{"machine": machine.describe(ROOT)}]
    print(HEAD)
    for world in worlds:
        command = [sys.executable, "-m", "benchmarks.scale", "--one", "--worlds", str(world), "--shards", str(shards)]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, timeout=_LIMIT)
        lines.append(json.loads(done.stdout))
        print(show(lines[-1]), flush=True)
    if not arguments.quick:
        _RESULTS.parent.mkdir(exist_ok=True)
        _RESULTS.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
