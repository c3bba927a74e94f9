"""`asyncckpt diff`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from asyncckpt.cli import places
from asyncckpt.cli.answers import NO, OK, Answer
from asyncckpt.read.contents import StoredTensor
from asyncckpt.read.diff import ABSENT, PartDiff, ValueDiff, diff

_SHOWN = 60
"""Characters of a value that people are shown; `--json` has all."""


def compare(before: str, after: str) -> Answer:
    """What is different in the second checkpoint."""
    with places.reader_of(before) as one, places.reader_of(after) as two:
        found = diff(one, two)
    same = all(part.how == "same" for part in found)
    return Answer({"same": same, "parts": [_data(part) for part in found]}, _lines(found), OK if same else NO)


def _data(part: PartDiff) -> dict[str, Any]:
    retyped = part.retyped or {}
    return {
        "part": part.part,
        "how": part.how,
        "added": list(part.added),
        "removed": list(part.removed),
        "changed": list(part.changed),
        "retyped": [{"name": name, "before": _type(old), "after": _type(new)} for name, (old, new) in retyped.items()],
        "values": [_value_data(value) for value in part.values],
    }


def _type(tensor: StoredTensor) -> dict[str, Any]:
    return {"dtype": tensor.dtype, "shape": list(tensor.shape)}


def _value_data(value: ValueDiff) -> dict[str, Any]:
    """Values stand as the nodes of the leaf tree; one that a side lacks is left out."""
    sides = {"before": value.before, "after": value.after}
    return {"path": value.path} | {name: node for name, node in sides.items() if node is not ABSENT}


def _lines(found: list[PartDiff]) -> Iterator[str]:
    for part in found:
        yield f"{part.part}: {part.how}"
        for name in part.removed:
            yield f"  - {name}"
        for name in part.added:
            yield f"  + {name}"
        for name, (old, new) in (part.retyped or {}).items():
            yield f"  ! {name}: {_shown_type(old)} -> {_shown_type(new)}"
        for name in part.changed:
            yield f"  ~ {name}"
        for value in part.values:
            yield f"  ~ {value.path}: {_shown(value.before)} -> {_shown(value.after)}"


def _shown_type(tensor: StoredTensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _shown(node: Any) -> str:
    if node is ABSENT:
        return "nothing"
    text = json.dumps(node)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
