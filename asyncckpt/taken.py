"""Which steps of a run are taken, and which of these a save may have all the same."""

from __future__ import annotations

from collections.abc import Iterable

from asyncckpt.errors import CheckpointExistsError
from asyncckpt.fetching import Loaded
from asyncckpt.handle import SaveHandle
from asyncckpt.run import Run


class TakenSteps:
    """As the owner of the run knows them: only its saves add to what there was when it came.

    What is above the highest of them is free; below it the storage is asked, so that nothing here grows with the run.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._highest = max(run.taken(), default=-1)
        self._damaged: set[int] = set()
        """Those that were damaged when a restore wanted them."""
        self._lacking: set[int] = set()
        """Those that had not all parts when a restore wanted them."""

    def add(self, step: int) -> None:
        self._highest = max(self._highest, step)

    def restored(self, loaded: Loaded, *, whole: bool) -> None:
        """A restore, of the `whole` state or of parts of it, has passed over some steps: they are free, once."""
        self._damaged.update(loaded.passed_over)
        if whole:
            self._lacking.update(loaded.lacking)

    def committed(self, step: int) -> None:
        """It is not free any more."""
        self._damaged.discard(step)
        self._lacking.discard(step)

    def may_replace(self, step: int, overwrite: bool, in_flight: Iterable[SaveHandle]) -> bool:
        """Whether a save of `step` takes the place of a committed one.

        Looks at the storage, which may be slow or hung, only where it may be there.

        Raises:
            CheckpointExistsError: it may not be saved without `overwrite`.
        """
        if overwrite:
            return True
        if any(handle.step == step and not handle.done() for handle in in_flight):
            raise CheckpointExistsError(f"step {step} is being saved already; give overwrite=True to save it again")
        if step > self._highest or not self._run.exists(step):
            return False
        if step in self._damaged or self._left_behind(step):
            return True
        raise CheckpointExistsError(
            f"step {step} is committed already in {self._run.storage.url}. Give overwrite=True to replace it, or "
            "restore(..., rewind=True) to leave the branch it is on."
        )

    def _left_behind(self, step: int) -> bool:
        """Whether a restore went back behind `step`, by a rewind or for want of a part, so that it may be saved anew.

        Raises:
            CheckpointExistsError: it is pinned there.
        """
        if step not in self._lacking and step in self._run.steps():
            return False
        if self._run.is_pinned(step):
            raise CheckpointExistsError(
                f"step {step} is pinned in {self._run.storage.url}, and the training went back behind it. Unpin it, or "
                "give overwrite=True to replace it."
            )
        return True
