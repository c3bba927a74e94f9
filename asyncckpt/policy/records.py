"""What is known of one committed checkpoint, as a policy and a person see it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime


@dataclass(frozen=True, slots=True)
class Record:
    """One committed checkpoint. Nothing in it was verified but the manifest."""

    step: int
    attempt: str = ""
    """Unique to this save of the step."""
    sequence: int = 0
    """Grows by one with each commit of a run, whatever the clock says."""
    created: datetime | None = None
    """In UTC, by the clock of the machine that wrote it; None where that is no time."""
    size: int = 0
    """Bytes of all files."""
    parts: tuple[str, ...] = ()
    """Those that it has, exports included."""
    exports: tuple[str, ...] = ()
    """Those of them that are for reading only: no training is resumed from them."""
    omitted: tuple[str, ...] = ()
    """The parts of the state that `save` left out."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Those of `save`, and over them those of `annotate`. One that was not finite is NaN."""
    pinned: bool = False
    finite: bool | None = None
    """Whether all floating tensors were finite; None where nobody looked."""
    rewound: bool = False
    """Whether it lies on a branch that was left by a rewind."""
    damaged: bool = False
    """Whether its manifest can't be read. Then nothing but `step` and `doubt` is known, and it counts for no policy."""
    doubt: str = ""
    """What of it, manifest or notes, can't be read, and why. No policy may delete it."""

    @property
    def complete(self) -> bool:
        """Whether it has all parts of the state that was given to `save`."""
        return not self.omitted
