"""How small, and how fast: `python -m benchmarks.compression --data DIRECTORY` (made by `benchmarks.trained`).

Every contender codes the same trained numbers on one thread, in chunks of 8 MiB, in turn with the others in each round;
what it gives is decoded and compared. Then the longest time that a call keeps the interpreter from another thread.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.coders import CHUNK, CONTENDERS, Array, Contender
from benchmarks.machine import describe
from benchmarks.spread import spread

RESULTS = Path(__file__).resolve().parent / "results" / "compression.jsonl"
HOLD_SIZE = 32 << 20
HOLD_TRIES = 8


def sets(data: Path) -> dict[str, tuple[str, Array, Array | None]]:
    """By name: the dtype, the bytes, and those of a base where the difference is coded."""

    def numbers(beta2: str, name: str) -> Array:
        return np.load(data / beta2 / f"{name}.npy")

    def raw(array: Array) -> Array:
        flat = array.view(np.uint8)
        return flat[: len(flat) // 4096 * 4096].copy()

    weights = numbers("0.95", "weights0")
    found: dict[str, tuple[str, Array, Array | None]] = {
        "bf16 weights": ("BF16", raw(to_bf16(weights)), None),
        "fp32 weights": ("F32", raw(weights), None),
        "fp32 exp_avg_sq": ("F32", raw(numbers("0.95", "exp_avg_sq0")), None),
    }
    for beta2 in ("0.95", "0.999"):
        for name in ("weights", "exp_avg_sq"):
            now, before = raw(numbers(beta2, f"{name}0")), raw(numbers(beta2, f"{name}-1"))
            found[f"fp32 {name}, step to step, beta2={beta2}"] = ("F32", now, before)
    return found


def to_bf16(array: Array) -> Array:
    """Rounded to the nearest, to even between two: what torch does."""
    bits = array.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def once(contender: Contender, data: Array, base: Array | None, target: Array) -> tuple[float, float, int]:
    """Seconds of the processor that encoding and decoding take, and the bytes stored.

    Not of the clock: on a machine that does nothing else they are the same, and on one that does they are steadier.
    """
    encoding = decoding = 0.0
    size = 0
    for start in range(0, len(data), CHUNK):
        chunk, other = data[start : start + CHUNK], None if base is None else base[start : start + CHUNK]
        begun = time.process_time()
        stored = contender.encode(chunk, other)
        encoding += time.process_time() - begun
        piece = stored[1] if isinstance(stored, tuple) else stored
        size += len(piece)
        if isinstance(stored, tuple):  # it lies in memory that the next call overwrites
            stored = (stored[0], bytes(piece))
        begun = time.process_time()
        contender.decode(stored, target[: len(chunk)], other)
        decoding += time.process_time() - begun
        if not np.array_equal(target[: len(chunk)], chunk):
            raise AssertionError("it did not come back")
    return encoding, decoding, size


def hold(call: Callable[[], object]) -> float:
    """Milliseconds that another thread was kept from the interpreter: the least of some tries."""
    least = float("inf")
    for _ in range(HOLD_TRIES):
        go, done = threading.Event(), threading.Event()
        worker = threading.Thread(target=lambda go=go, done=done: (go.wait(), call(), done.set()))
        worker.start()
        go.set()
        last, longest = time.perf_counter(), 0.0
        while not done.is_set():
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
        longest = max(longest, time.perf_counter() - last)
        worker.join()
        least = min(least, longest)
    return 1000 * least


def measure(data: Path, seconds: float, names: list[str]) -> list[dict[str, Any]]:
    made = sets(data)
    target = np.zeros(CHUNK, np.uint8)
    contenders: dict[tuple[str, str], Contender] = {}
    errors: dict[str, str] = {}
    for dtype in {dtype for dtype, _, _ in made.values()}:
        for name in names:
            try:
                contenders[name, dtype] = CONTENDERS[name](dtype)
                contenders[name, dtype].encode(made["bf16 weights"][1][:CHUNK], None)
            except Exception as error:  # one that is not there, or does not run here: its row says so
                errors[name] = f"{type(error).__name__}: {error}"
    times: dict[tuple[str, str], list[tuple[float, float, int]]] = defaultdict(list)
    deadline, rounds = time.monotonic() + seconds, 0
    while time.monotonic() < deadline or rounds < 2:
        order = [(what, name) for what in made for name in names if name not in errors]
        random.Random(rounds).shuffle(order)
        for what, name in order:
            dtype, numbers, base = made[what]
            times[what, name].append(once(contenders[name, dtype], numbers, base, target))
        rounds += 1
        print(f"round {rounds}, {max(0.0, deadline - time.monotonic()):.0f} s left", file=sys.stderr, flush=True)
    rows: list[dict[str, Any]] = []
    for (what, name), taken in sorted(times.items()):
        size = len(made[what][1])
        rows.append({"what": what, "by": name, "bytes": size, "stored": taken[0][2], "rounds": taken})
    rows += [{"by": name, "error": error} for name, error in errors.items()]
    return rows


def holds(data: Path, names: list[str]) -> list[dict[str, Any]]:
    sys.setswitchinterval(0.0002)
    rows = []
    for what, (dtype, numbers, base) in sets(data).items():
        if base is not None and "weights" not in what:
            continue
        chunk = np.resize(numbers, HOLD_SIZE)
        other = None if base is None else np.resize(base, HOLD_SIZE)
        target = np.zeros(HOLD_SIZE, np.uint8)
        for name in names:
            try:
                contender = CONTENDERS[name](dtype)
                stored = contender.encode(chunk, other)
                if isinstance(stored, tuple):
                    stored = (stored[0], bytes(stored[1]))
            except Exception as error:
                print(f"{name}: {error}", file=sys.stderr)
                continue
            encode = hold(lambda: contender.encode(chunk, other))  # noqa: B023
            decode = hold(lambda: contender.decode(stored, target, other))  # noqa: B023
            rows.append({"hold": what, "by": name, "encode_ms": encode, "decode_ms": decode})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: sizes over raw, GB/s of raw bytes, and those over ZipNN's in the same round; medians, 95 % bounds."""
    lines = [
        "| what | by | size over raw | encode GB/s | over ZipNN | decode GB/s | over ZipNN |",
        "|---|---|---|---|---|---|---|",
    ]
    kept = {(row["what"], row["by"]): row for row in rows if "rounds" in row}
    for (what, by), row in kept.items():
        cells = [what, by, f"{row['stored'] / row['bytes']:.4f}"]
        rival = kept.get((what, "ZipNN"))
        for side in (0, 1):
            found = spread([row["bytes"] / 1e9 / taken[side] for taken in row["rounds"]])
            assert found is not None
            cells.append(f"{found.median:.2f} [{found.low:.2f}, {found.high:.2f}]")
            ratio = None
            if rival is not None:
                pairs = zip(rival["rounds"], row["rounds"], strict=True)
                ratio = spread([theirs[side] / mine[side] for theirs, mine in pairs])
            cells.append("" if ratio is None else f"{ratio.median:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]")
        lines.append("| " + " | ".join(cells) + " |")
    lines += [f"\n{row['by']}: {row['error']}" for row in rows if "error" in row]
    held = [row for row in rows if "hold" in row]
    if held:
        lines += ["", "| longest hold of the GIL, 32 MiB | by | encode ms | decode ms |", "|---|---|---|---|"]
        lines += [f"| {r['hold']} | {r['by']} | {r['encode_ms']:.1f} | {r['decode_ms']:.1f} |" for r in held]
    return "\n".join(lines)


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Size over raw against speed, encoding and decoding, for weights."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = ["bf16 weights", "fp32 weights"]
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), sharex="row")
    for line, what in zip(axes, kinds, strict=True):
        for side, (axis, title) in enumerate(zip(line, ("encode", "decode"), strict=True)):
            for row in rows:
                if row.get("what") != what:
                    continue
                found = spread([row["bytes"] / 1e9 / taken[side] for taken in row["rounds"]])
                assert found is not None
                share = row["stored"] / row["bytes"]
                axis.plot(share, found.median, "o")
                axis.annotate(row["by"], (share, found.median), textcoords="offset points", xytext=(4, 4), fontsize=8)
            axis.set(title=f"{what}, {title}", xlabel="size over raw", ylabel="GB/s, one thread", yscale="log")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip() or "?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="what benchmarks.trained made")
    parser.add_argument("--seconds", type=float, default=45.0)
    parser.add_argument("--only", nargs="*", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--holds", action="store_true", help="measure the longest hold of the GIL, and add it")
    parser.add_argument("--show", action="store_true", help="the tables and the picture again, from the last results")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.show or args.holds else []
    if args.holds:
        rows += holds(args.data, args.only)
    elif not args.show:
        head = {"machine": describe(Path.cwd()), "commit": commit(), "cores used": 1, "pid": os.getpid()}
        rows = [head, *measure(args.data, args.seconds, args.only)]
    if not args.show:
        args.out.parent.mkdir(exist_ok=True)
        args.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(table(rows))
    picture(rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
