"""Where a resume takes the parts from that a checkpoint does not have: pure functions over records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from asyncckpt.policy.records import Record


def source(records: Iterable[Record], part: str, step: int, sequence: int) -> Record | None:
    """Where the checkpoint of `step` with this `sequence` gets the `part` that it lacks; None where nothing has it.

    It is the newest of the older ones that have it: of a lower step, and committed earlier, so that what was saved
    after going back is never mixed into what was there before. A branch that was left has none.
    """
    older = [
        r
        for r in records
        if r.step < step and r.sequence < sequence and part in r.parts and part not in r.exports and not r.rewound
    ]
    return max(older, key=lambda r: r.step, default=None)


def needed(records: Sequence[Record], by: Iterable[Record]) -> dict[int, str]:
    """By step, which of `records` others of them need for the parts that these lack, and why in words."""
    found: dict[int, list[str]] = {}
    for record in by:
        for part in record.omitted:
            origin = source(records, part, record.step, record.sequence)
            if origin is not None:
                found.setdefault(origin.step, []).append(f"has the {part} that step {record.step} lacks")
    return {step: ", ".join(whys) for step, whys in found.items()}
