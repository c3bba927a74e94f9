"""`asyncckpt prune`, `pin` and `unpin`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, cast

from asyncckpt.catalog import notes
from asyncckpt.catalog.catalog import Catalog
from asyncckpt.catalog.custody import Custody
from asyncckpt.cli import places
from asyncckpt.cli.answers import Answer, UsageError, table
from asyncckpt.cli.units import show_size
from asyncckpt.cli.verifying import check
from asyncckpt.policy.keep import Keep, Verdict
from asyncckpt.policy.records import Record


@dataclass(frozen=True)
class Clauses:
    """What the command line says is to stay; None where it says nothing. `within` is in seconds."""

    last: int | None
    every: int | None
    within: float | None
    best: int | None
    metric: str | None
    mode: str


def prune(location: str, clauses: Clauses, dry_run: bool) -> Answer:
    """Delete what no clause keeps, or say what would be.

    Raises:
        UsageError: the clauses make no sense.
        ConflictError: a live writer owns the run, and it is no dry run.
    """
    keep = _keep(clauses)
    storage = places.storage_of(location)
    records = Catalog(storage).records()
    if dry_run or not records:
        return _answer(storage.url, records, keep.explain(records), deleted=set(), dry_run=dry_run)
    with places.owned(storage) as check_owner:
        custody = Custody(storage, keep, check_owner)
        records = custody.catalog.records()
        custody.vouch(lambda step: (check(custody.catalog, step) or {"ok": False})["ok"])
        deleted = set(custody.retire())
    return _answer(storage.url, records, keep.explain(records), deleted, dry_run=False)


def _keep(clauses: Clauses) -> Keep:
    if (clauses.last, clauses.every, clauses.within, clauses.best) == (None,) * 4:
        raise UsageError("say what is to stay: --keep-last, --keep-every, --keep-within or --keep-best")
    try:
        return Keep(
            last=1 if clauses.last is None else clauses.last,
            every=clauses.every,
            within=None if clauses.within is None else timedelta(seconds=clauses.within),
            best=clauses.best,
            metric=clauses.metric,
            mode=cast(Literal["min", "max"], clauses.mode),
        )
    except (ValueError, OverflowError) as error:
        raise UsageError(str(error)) from None


def _answer(
    url: str, records: list[Record], verdicts: Mapping[int, Verdict], deleted: set[int], *, dry_run: bool
) -> Answer:
    """What is to go and was not deleted is being read, or is the newest that could be verified."""
    gone = {r.step for r in records if not verdicts[r.step].stays} if dry_run else deleted
    why = {step: verdict.why for step, verdict in verdicts.items()}
    for step, verdict in verdicts.items():
        if not verdict.stays and step not in gone:
            why[step] = f"{verdict.why}, but it is being read, or nothing newer could be verified"
    freed = sum(r.size for r in records if r.step in gone)
    data = {
        "run": url,
        "dry_run": dry_run,
        "deleted": sorted(gone) if not dry_run else [],
        "bytes": freed,
        "checkpoints": [{"step": r.step, "stays": r.step not in gone, "why": why[r.step]} for r in records],
    }
    return Answer(data, _lines(records, gone, why, freed, dry_run))


def _lines(records: list[Record], gone: set[int], why: dict[int, str], freed: int, dry_run: bool) -> Iterable[str]:
    verb = "would go" if dry_run else "deleted"
    rows = [[str(r.step), verb if r.step in gone else "stays", why[r.step]] for r in records]
    yield from table(["STEP", "", "WHY"], rows, right=(0,))
    yield f"{len(gone)} of {len(records)} {verb}, {show_size(freed)}"


def pin(reference: str, pinned: bool) -> Answer:
    """Keep a checkpoint from every policy, or no longer. This needs no ownership of the run."""
    run, step = places.checkpoint_of(reference)
    notes.pin(run, step, pinned)
    return Answer({"step": step, "pinned": pinned}, [f"step {step} is {'pinned' if pinned else 'no longer pinned'}"])
