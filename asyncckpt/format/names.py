"""Names of files and folders. Whatever does not match this grammar is foreign: never read, never deleted."""

from __future__ import annotations

import re

MANIFEST = "manifest.json"
RECORD = "state.json"
NOTES = "notes.json"
REWINDS = "rewinds.json"
MIRRORING = "mirroring.json"
LOCK = ".asyncckpt.lock"
SUFFIX = ".safetensors"
CODED, STILL = ".coded", ".still"
"""Suffixes of files whose bytes are not an image: chunks of one, coded; those that have not changed lie apart."""

MAX_WORLD = 99_999
"""The most ranks that a checkpoint can be of."""

_STEP = re.compile(r"step-(\d{8,19})")
_ATTEMPT = re.compile(r"[0-9a-f]{12}")
_TEMPORARY = re.compile(r"\.[a-z]+(-[0-9]{5})?\.json-[0-9a-f]{12}\.tmp")
_SPARE = re.compile(r"\.spare-[0-9a-f]{12}")
_RANK_RECORD = re.compile(r"rank-[0-9]{5}\.json")
_OF_RANK = re.compile(r"(.*)\.rank-[0-9]{5}", re.DOTALL)
_CODED = re.compile(r"([^.]*)(?:\.rank-([0-9]{5}))?\.[0-9a-f]{12}\.(?:coded|still)")
_NONCE = re.compile(r"\.asyncckpt\.nonce-[0-9a-f]{12}")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")
PART_RULE = "1-64 letters, digits, '_' or '-', not starting with '-'"

EXPORT_DTYPES = ("bf16", "fp16", "fp32")
"""What the floating tensors of a part can be cast to, by the names that users give."""


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def parse_step(name: str) -> int | None:
    """The step of a folder name, or None where the name is not one that `step_name` gives."""
    match = _STEP.fullmatch(name)
    if match is None:
        return None
    step = int(match[1])
    return step if step_name(step) == name else None


def new_attempt() -> str:
    return _fresh()


def _fresh() -> str:
    import secrets  # whoever only reads need not wait for what it loads

    return secrets.token_hex(6)


def is_attempt(name: str) -> bool:
    return _ATTEMPT.fullmatch(name) is not None


def is_part(name: str) -> bool:
    return _PART.fullmatch(name) is not None


def export_part(part: str, dtype: str) -> str:
    """The part that holds what `part` does, cast to one of `EXPORT_DTYPES`."""
    return f"{part}-{dtype}"


def image_file(part: str, rank: int | None = None) -> str:
    """The file of a part's image, or of the share of one of several ranks."""
    return f"{_of(part, rank)}{SUFFIX}"


def _of(part: str, rank: int | None) -> str:
    return part if rank is None else f"{part}.rank-{rank:05d}"


def rank_record(rank: int) -> str:
    """The prepare record of one of several ranks."""
    return f"rank-{rank:05d}.json"


def coded_file(part: str, attempt: str, suffix: str, rank: int | None = None) -> str:
    """A file of coded chunks, first written by `attempt`: it keeps its name where later checkpoints share it."""
    return f"{_of(part, rank)}.{attempt}{suffix}"


def coded_of(name: str) -> tuple[str, int | None] | None:
    """The part, and the one of several ranks, whose coded chunks the file `name` holds; None: it is no such file."""
    found = _CODED.fullmatch(name)
    if found is None or not is_part(found[1]):
        return None
    return found[1], None if found[2] is None else int(found[2])


def is_image(name: str) -> bool:
    """Whether `name` is a file that holds an image as it is."""
    stem = name.removesuffix(SUFFIX)
    of_rank = _OF_RANK.fullmatch(stem)
    return stem != name and is_part(of_rank[1] if of_rank else stem)


def is_data_file(name: str) -> bool:
    """Whether `name` is a file that an attempt may hold."""
    return bool(name == RECORD or _RANK_RECORD.fullmatch(name) or coded_of(name) is not None or is_image(name))


def new_nonce() -> str:
    """A fresh name for the file by which ranks find out whether they see the same directory."""
    return f".asyncckpt.nonce-{new_attempt()}"


def is_nonce(name: str) -> bool:
    return _NONCE.fullmatch(name) is not None


def new_spare() -> str:
    """A fresh name for a file of a retired checkpoint, to be written over."""
    return f".spare-{_fresh()}"


def is_spare(name: str) -> bool:
    return _SPARE.fullmatch(name) is not None


def temporary(name: str) -> str:
    """A fresh name for the file that will be renamed to `name`. Never reused."""
    return f".{name}-{_fresh()}.tmp"


def is_temporary(name: str) -> bool:
    return _TEMPORARY.fullmatch(name) is not None
