"""Where stale parts come from, and that retention leaves it."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from asyncckpt.policy.keep import Keep, judge
from asyncckpt.policy.records import Record
from asyncckpt.policy.stale import source

PARTS = ("model", "ema", "optimizer")


@st.composite
def partial_runs(draw: st.DrawFn) -> list[Record]:
    """Runs of checkpoints with some parts each; some were saved again after going back, or lie on branches left."""
    steps = sorted(draw(st.sets(st.integers(0, 60), min_size=1, max_size=14)))
    sequences = draw(st.just(list(range(len(steps)))) | st.permutations(range(len(steps))))
    found = []
    for step, sequence in zip(steps, sequences, strict=True):
        omitted = draw(st.sets(st.sampled_from(PARTS), max_size=2))
        parts = tuple(part for part in PARTS if part not in omitted)
        rewound = draw(st.sampled_from([False, False, False, True]))
        found.append(Record(step, sequence=sequence, parts=parts, omitted=tuple(sorted(omitted)), rewound=rewound))
    return found


def restorable(records: list[Record]) -> dict[str, int] | None:
    """By part, the step that a restore with every part allowed to be stale takes it from."""
    for record in sorted(records, key=lambda r: -r.step):
        if record.rewound:
            continue
        origins = {part: source(records, part, record.step, record.sequence) for part in record.omitted}
        if all(origins.values()):
            return dict.fromkeys(record.parts, record.step) | {p: o.step for p, o in origins.items() if o is not None}
    return None


@given(partial_runs(), st.sampled_from(PARTS))
def test_a_source_is_the_newest_of_what_was_there_before(records: list[Record], part: str) -> None:
    for record in records:
        found = source(records, part, record.step, record.sequence)
        before = [
            r.step for r in records
            if r.step < record.step and r.sequence < record.sequence and part in r.parts and not r.rewound
        ]  # fmt: skip
        assert (found.step if found else None) == max(before, default=None)


def test_an_export_is_no_source() -> None:
    records = [Record(1, sequence=1, parts=("model-bf16",), exports=("model-bf16",))]
    assert source(records, "model-bf16", 2, 2) is None


@given(partial_runs(), st.integers(1, 4), st.sampled_from([{}, {"every": 7}, {"every": 2}]))
def test_retention_leaves_the_newest_restorable_state_as_it_is(
    records: list[Record], last: int, more: dict[str, Any]
) -> None:
    before = restorable(records)
    verdicts = judge(records, Keep(last=last, **more))
    assert restorable([r for r in records if verdicts[r.step].stays]) == before


@given(partial_runs(), st.integers(1, 4), st.sets(st.integers(0, 60)))
def test_what_is_kept_can_be_restored_as_before(records: list[Record], last: int, going: set[int]) -> None:
    """Under `Keep` and under a policy of the user's own; a branch that was left needs nothing."""
    for keep in (Keep(last=last), lambda asked: [r.step for r in asked if r.step in going]):
        verdicts = judge(records, keep)
        kept = [r for r in records if verdicts[r.step].stays]
        for record in kept:
            for part in () if record.rewound else record.omitted:
                if not verdicts[record.step].why.startswith("has the"):
                    found = source(kept, part, record.step, record.sequence)
                    assert found == source(records, part, record.step, record.sequence)
