"""What a child process of the benchmark runs: `python -m benchmarks.roles FD ROLE OPTIONS`."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

from benchmarks.child import Reporter


def _machine(tell: Reporter, directory: str, size: int, repeats: int, cuda: bool) -> None:
    from benchmarks import machine

    tell(kind="floors", **machine.floors(Path(directory), size, repeats, cuda))


def _calibrate(tell: Reporter, shape: dict[str, Any], factor: float) -> None:
    from benchmarks import measure
    from benchmarks.model import Shape

    measure.calibrate(tell, Shape(**shape), factor)


def _timing(tell: Reporter, peer: str, shape: dict[str, Any], directory: str, schedule: list[list[int]]) -> None:
    from benchmarks import measure, peers
    from benchmarks.model import Shape, Training

    training = Training(Shape(**shape))
    measure.timing(tell, training, lambda: peers.make(peer, Path(directory), training), schedule)


def _save(tell: Reporter, peer: str, shape: dict[str, Any], directory: str, leave: bool) -> None:
    from benchmarks import measure, peers
    from benchmarks.model import Shape, Training

    training = Training(Shape(**shape))
    measure.save_once(tell, training, peers.make(peer, Path(directory), training), leave)


def _restore(
    tell: Reporter, peer: str, shape: dict[str, Any], directory: str, step: int, fingerprint: str, repeats: int
) -> None:
    from benchmarks import measure, peers
    from benchmarks.model import Shape, Training

    training = Training(Shape(**shape), seed=1)
    measure.restore(tell, training, peers.make(peer, Path(directory), training), step, fingerprint, repeats)


def _save_cost(tell: Reporter, tensors: int, saves: int, directory: str) -> None:
    from benchmarks import save_cost

    save_cost.measure(tell, tensors, saves, directory)


def _commit_speed(tell: Reporter, shape: dict[str, Any], directory: str, rounds: int) -> None:
    from benchmarks import alternate
    from benchmarks.model import Shape

    alternate.speed(tell, Shape(**shape), Path(directory), rounds)


def _endurance(tell: Reporter, directory: str, saves: int) -> None:
    from benchmarks import alternate

    alternate.endurance(tell, Path(directory), saves)


def _auto_overhead(tell: Reporter, shape: dict[str, Any], directory: str, max_overhead: float, seconds: float) -> None:
    from benchmarks import auto_overhead

    auto_overhead.measure(tell, shape, directory, max_overhead, seconds)


def _object(tell: Reporter, peer: str, size: int, saves: int, port: int, url: str) -> None:
    from benchmarks import object as object_

    object_.measure(tell, peer, size, saves, port, url)


def _nursery(tell: Reporter) -> None:
    from benchmarks import lives

    lives.nursery(tell)


_ROLES = {
    "machine": _machine,
    "calibrate": _calibrate,
    "timing": _timing,
    "save": _save,
    "restore": _restore,
    "save_cost": _save_cost,
    "commit_speed": _commit_speed,
    "endurance": _endurance,
    "auto_overhead": _auto_overhead,
    "object": _object,
    "nursery": _nursery,
}


def main() -> None:
    """Ends at once when the role is done: what a peer leaves running is the parent's to end."""
    fd, role, options = sys.argv[1:]
    warnings.simplefilter("ignore")
    logging.basicConfig(level=logging.ERROR)
    try:
        _ROLES[role](Reporter(int(fd)), **json.loads(options))
    except BaseException as error:
        traceback.print_exc()
        text = " ".join(str(error).split())
        print(f"{type(error).__name__}: {text}", file=sys.stderr, flush=True)
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
