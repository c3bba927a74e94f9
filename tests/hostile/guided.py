"""The same changes, chosen by what they reach: coverage-guided, by atheris (the extra `fuzz`).

    python -m hostile.guided FOLDER SECONDS      # in the folder `tests`; FOLDER keeps what was learned
    python -m hostile.guided FILE                # one case again

A case is a string of bytes, from which every choice of `mutate` is taken; so libFuzzer, which changes the bytes and
keeps those that reach branches of asyncckpt not seen before, changes the structure, and the seals stay whole.
"""

from __future__ import annotations

import copy
import random
import resource
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["asyncckpt"]):
    import asyncckpt.checkpointer  # noqa: F401 - which it would load when it is first used, and not instrumented
    from hostile.forge import Forgery, clear, commit
    from hostile.fuzz import CASE_SECONDS, MEMORY
    from hostile.judge import judge
    from hostile.mutate import mutate

LONGEST = 512
"""Bytes of a case: enough for every choice of three changes."""


class Choices(random.Random):
    """Chance that is read from bytes; when they are used up, always the first choice."""

    def __init__(self, data: bytes) -> None:
        super().__init__(0)
        self._data, self._at = data, 0

    def getrandbits(self, k: int, /) -> int:
        size = -(-k // 8)
        piece = self._data[self._at : self._at + size]
        self._at += size
        return int.from_bytes(piece, "little") & ((1 << k) - 1)

    def random(self) -> float:
        return self.getrandbits(53) / (1 << 53)


class Target:
    """One changed checkpoint after another, in `folder`."""

    def __init__(self, folder: Path) -> None:
        commit(folder / "original")
        judge(folder / "original", watched=False)
        self._original = Forgery.of(folder / "original")
        self._run = folder / "run"

    def __call__(self, data: bytes) -> None:
        forgery = copy.deepcopy(self._original)
        mutate(forgery, Choices(data))
        clear(self._run)
        forgery.write(self._run)
        judge(self._run)


def main() -> None:
    place = Path(sys.argv[1]).absolute()
    with tempfile.TemporaryDirectory(prefix="hostile-") as work:
        target = Target(Path(work))
        if len(sys.argv) == 2:
            target(place.read_bytes())
            return
        corpus = place / "corpus"
        corpus.mkdir(parents=True, exist_ok=True)
        for seed in range(64):  # to begin with; what it learns it adds
            (corpus / f"seed-{seed}").write_bytes(random.Random(seed).randbytes(64))
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        limits = [f"-max_total_time={sys.argv[2]}", f"-timeout={CASE_SECONDS}", f"-max_len={LONGEST}"]
        memory = f"-rss_limit_mb={resident + (MEMORY >> 20)}"
        atheris.Setup([sys.argv[0], *limits, memory, f"-artifact_prefix={place}/", str(corpus)], target)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
