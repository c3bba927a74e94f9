"""What a policy of the user's own says, held against what it was asked."""

from __future__ import annotations

from asyncckpt.errors import CheckpointError
from asyncckpt.policy.keep import Policy
from asyncckpt.policy.records import Record


def advise(policy: Policy, records: list[Record]) -> list[int]:
    """The steps of `records` that `policy` lets go.

    Raises:
        CheckpointError: it raised, or named what is no step of theirs.
    """
    known = {record.step for record in records}
    try:
        steps = [step.__index__() for step in policy(records)]
        foreign = [step for step in steps if step not in known]
        if foreign:
            raise ValueError(f"it named the steps {foreign}, which it was not given")
    except Exception as error:
        raise CheckpointError(
            f"the policy given as keep= failed, so nothing was deleted: {type(error).__name__}: {error}"
        ) from error
    return steps
