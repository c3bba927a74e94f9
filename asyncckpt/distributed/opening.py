"""One run for all ranks: rank 0's writer comes to own it, then all prove that they see the same directory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec

from asyncckpt.distributed.council import Council
from asyncckpt.errors import CheckpointError, RankError
from asyncckpt.format import names
from asyncckpt.storage.base import Storage
from asyncckpt.write.messages import Fault

Opened = TypeVar("Opened")


class _Start(msgspec.Struct):
    """What a rank comes with: how it was configured, in words."""

    settings: dict[str, str]


class _Report(msgspec.Struct):
    fault: Fault | None = None


class _Word(msgspec.Struct):
    nonce: str = ""


def open_together(
    council: Council,
    storage: Storage,
    settings: dict[str, str],
    make: Callable[[], Opened],
    undo: Callable[[Opened], None],
) -> Opened:
    """What `make` gives, once it has given that to every rank; `undo` takes it back where it has not.

    Raises:
        CheckpointError: what `make` has raised, or that another rank could not be opened.
        ValueError: the ranks are configured differently.
        RankError: a rank did not come, or does not see the directory that rank 0 sees.
    """
    rank, made = council.group.rank, None
    nonce = ""
    try:

        def begin(starts: Sequence[_Start]) -> _Word:
            nonlocal made, nonce
            _check_settings(starts)
            made = make()
            nonce = names.new_nonce()
            for name in filter(names.is_nonce, storage.list("")):
                storage.delete(name)
            storage.put(nonce, b"")
            return _Word(nonce)

        heard = council.agree("opening the run", _Start(settings), begin, _Word)
        fault: Exception | None = None
        if rank:
            try:
                if heard.nonce not in storage.list(""):
                    raise RankError(
                        f"rank {rank} does not find in {storage.url} what rank 0 has written there. All ranks must be "
                        "given the same directory, on a storage that they share.",
                        rank=rank,
                    )
                made = make()
            except Exception as error:
                fault = error

        def judge(reports: Sequence[_Report]) -> _Word:
            for number, report in enumerate(reports):
                if report.fault is not None:
                    raise RankError(f"rank {number} can't open the run: {report.fault.message}", rank=number)
            return _Word()

        try:
            council.agree("opening the run", _Report(None if fault is None else Fault.of(fault)), judge, _Word)
        except RankError:
            if fault is not None:
                raise fault from None
            raise
        assert made is not None
        return made
    except BaseException:
        if made is not None:
            undo(made)
        raise
    finally:
        if nonce:
            storage.delete(nonce)


def _check_settings(starts: Sequence[_Start]) -> None:
    for rank, start in enumerate(starts):
        for name, value in starts[0].settings.items():
            if start.settings.get(name) != value:
                raise CheckpointError(
                    f"the ranks are configured differently: {name} is {value} on rank 0, and "
                    f"{start.settings.get(name)} on rank {rank}"
                )
