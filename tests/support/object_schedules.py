"""Lives of a run in an object store behind a faulty proxy, by seed; and what must hold of each."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from asyncckpt.catalog.catalog import Catalog
from asyncckpt.errors import CheckpointError, CheckpointExistsError, ConflictError, StorageError
from asyncckpt.format.image import Spec, layout
from asyncckpt.policy.codec import Codec
from asyncckpt.policy.keep import Keep
from asyncckpt.read.reader import CheckpointReader
from asyncckpt.storage.object import ObjectStorage
from asyncckpt.storage.urls import StorageOptions
from asyncckpt.testing.service import ServiceDriver, Value
from support.faulty_proxy import FAULTS, FaultyProxy, Request

SMALL, LARGE = 12 << 10, 1600 << 10
"""Items of four bytes: an image that goes out in one request, and one that takes two parts of 5 MiB."""


@dataclass
class Faults:
    """Chooses by chance, up to `most` in all: a client that is to end well must not be refused for ever."""

    rng: random.Random
    often: float
    most: int
    chosen: list[str] = field(default_factory=list)

    def __call__(self, request: Request) -> str | None:
        if len(self.chosen) >= self.most or self.rng.random() >= self.often:
            return None
        fault = self.rng.choice([*FAULTS, "409", "412"] if request.conditional else FAULTS)
        self.chosen.append(f"{fault} of {request.method} {request.key}?{request.query.partition('=')[0]}")
        return fault


@dataclass
class Verdict:
    """What came of a life. `wrong` are in words; `failed` are saves that were honestly told to have failed."""

    wrong: list[str]
    saved: int
    failed: int
    faults: list[str]


def value_of(seed: int, items: int = SMALL) -> Value:
    """An image of random bytes, and a tree."""
    data = np.random.default_rng(seed).standard_normal(items, dtype="<f4").tobytes()
    image = layout([Spec("w", "F32", (items,), 4)])
    return {"model": (image.header + data, {"seed": seed}), "note": (b"", [seed])}


def word_of(value: Value) -> tuple[bytes, object]:
    return bytes(value["model"][0]), value["model"][1]


def live(
    proxy: FaultyProxy,
    url: str,
    real: StorageOptions,
    faulty: StorageOptions,
    seed: int,
    choose: Callable[[Request], str | None] | None = None,
) -> Verdict:
    """One life: saves, saves over others, retention, a pin or a delete, then a second start.

    `choose`, or else chance, says which requests fail.
    """
    rng = random.Random(seed)
    faults = Faults(rng, rng.choice([0.05, 0.2, 0.5]), rng.choice([2, 8, 20]))
    proxy.choose = choose or faults
    committed: dict[int, Value] = {}
    unsure: dict[int, list[Value]] = {}
    deleted: set[int] = set()
    wrong: list[str] = []
    saved = failed = 0

    def attempt(what: str, act, *args, **options) -> bool:  # type: ignore[no-untyped-def]
        try:
            act(*args, **options)
        except (ConflictError, CheckpointExistsError) as error:
            wrong.append(f"false conflict at {what}: {error}")
        except StorageError as error:
            if "CANARY" in str(error):
                wrong.append(f"a secret in {error}")
            return False
        except CheckpointError as error:
            wrong.append(f"{what}: {type(error).__name__}: {error}")
        else:
            return True
        return False

    codec = rng.choice([Codec(), Codec("incremental"), Codec("zstd"), Codec("delta", 2)])
    for start in range(2):
        try:
            driver = ServiceDriver(url, keep=Keep(last=3), codec=codec, options=faulty)
        except StorageError:
            failed += 1
            continue
        except ConflictError as error:
            wrong.append(f"false conflict at start: {error}")
            break
        with driver:
            for number in range(2):
                step = 10 * start + number
                for replace in [False, True] if rng.random() < 0.3 else [False]:
                    value = value_of(rng.randrange(4), LARGE if rng.random() < 0.06 else SMALL)
                    if attempt(f"save of {step}", driver.save, step, value, replace=replace):
                        saved += 1
                        committed[step] = value
                        unsure.pop(step, None)
                    else:
                        failed += 1
                        unsure.setdefault(step, []).append(value)
            if start == 0 and 1 in committed and rng.random() < 0.5:
                attempt("pin", driver.pin, 1)
            elif start == 0 and 0 in committed and rng.random() < 0.5:
                attempt("delete", driver.delete, 0)
                deleted.add(0)
    proxy.choose = lambda request: None
    storage = ObjectStorage(url, real)
    wrong += judge(Catalog(storage), committed, unsure, deleted)
    return Verdict(wrong, saved, failed, faults.chosen)


def judge(
    catalog: Catalog, committed: dict[int, Value], unsure: dict[int, list[Value]], deleted: set[int]
) -> list[str]:
    """The newest that were reported are there and whole, and nothing is there that nobody saved."""
    wrong: list[str] = []
    there = catalog.committed()
    for step in there:
        possible = [word_of(v) for v in ([committed[step]] if step in committed else []) + unsure.get(step, [])]
        try:
            with CheckpointReader(catalog, step) as reader:
                reader.verify()
                word = bytes(reader.image("model").buffer), reader.tree("model")
        except CheckpointError as error:
            if step in committed and step not in unsure:
                wrong.append(f"step {step} was reported, and can't be read: {error}")
            continue
        if word not in possible:
            wrong.append(f"step {step} holds what nobody saved as it")
    lost = [step for step in sorted(committed)[-2:] if step not in there and step not in deleted]
    if lost:
        wrong.append(f"steps {lost} were reported and are not there, only {there}")
    return wrong
