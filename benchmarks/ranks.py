"""What a commit of several ranks costs: real processes over gloo, and many services in one process for the curve.

    python -m benchmarks.ranks [--ranks 1,2,4,8] [--simulated 2,8,32,64] [--saves 30]

Real: every rank is a process of its own with a writer of its own; a state of 1 MB that is alike on all ranks is saved
again and again, each save waited for. Simulated: the writers of all ranks are threads of one process and share its
interpreter, so that what grows with the number of ranks shows, and is overstated.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from asyncckpt.testing import RanksDriver, ServiceDriver

IMAGE = b"\x20\x0f\0\0\0\0\0\0" + b"{}".ljust(0x0F20) + b""
"""A safetensors file without a tensor."""


def real(ranks: int, saves: int) -> dict[str, float]:
    """Medians in milliseconds."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        home = str(Path(__file__).parents[1])
        done = subprocess.run(
            [*command, "-m", "benchmarks.ranks", "--child", folder, "--saves", str(saves)],
            check=True,
            capture_output=True,
            text=True,
            cwd=home,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": home},
        )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def child(folder: str, saves: int) -> None:
    import torch
    import torch.distributed as dist

    import asyncckpt

    dist.init_process_group("gloo")
    torch.manual_seed(0)
    state = {"model": torch.nn.Linear(512, 512)}
    blocked, committed = [], []
    with asyncckpt.Checkpointer(folder, overlap=False, keep=asyncckpt.Keep(last=1)) as ckpt:
        for step in range(saves):
            dist.barrier()
            begun = time.perf_counter()
            handle = ckpt.save(step, state)
            blocked.append(time.perf_counter() - begun)
            handle.result()
            committed.append(time.perf_counter() - begun)
    if dist.get_rank() == 0:
        print(json.dumps({"save": _median(blocked[5:]), "committed": _median(committed[5:])}), flush=True)
    dist.destroy_process_group()


def simulated(ranks: int, saves: int) -> float:
    value = {"model": (IMAGE, {}), "optimizer": (IMAGE, {})}
    times = []
    with tempfile.TemporaryDirectory() as folder:
        driver = RanksDriver(folder, world=ranks) if ranks > 1 else ServiceDriver(folder)
        with driver:
            for step in range(saves):
                begun = time.perf_counter()
                driver.save(step, value)
                times.append(time.perf_counter() - begun)
    return _median(times[2:])


def _median(seconds: list[float]) -> float:
    return round(1000 * statistics.median(seconds), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="1,2,4,8")
    parser.add_argument("--simulated", default="1,2,4,8,16,32,64")
    parser.add_argument("--saves", type=int, default=30)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.saves)
        return
    for ranks in map(int, filter(None, options.ranks.split(","))):
        print(f"{ranks} real ranks: {real(ranks, options.saves)} ms", flush=True)
    for ranks in map(int, filter(None, options.simulated.split(","))):
        print(f"{ranks} simulated ranks: committed after {simulated(ranks, max(6, options.saves // 3))} ms", flush=True)


if __name__ == "__main__":
    main()
