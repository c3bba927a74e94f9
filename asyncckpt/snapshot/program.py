"""What is to be copied of one part into one arena, and when: before `save` returns, or behind the fence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from asyncckpt.format.manifest import CHUNK_SIZE
from asyncckpt.snapshot.arena import Arena
from asyncckpt.snapshot.copy import Piece, pieces
from asyncckpt.snapshot.hashed import Chunk, Home, by_chunks
from asyncckpt.snapshot.known import Comparison, CopyOf
from asyncckpt.snapshot.plan import PartPlan


@dataclass
class Program:
    """The pieces that copy a part to its `home`; of what is on a GPU there is none."""

    home: Home
    comparison: Comparison | None
    eager: list[Piece] = field(default_factory=list)
    late: list[Piece] = field(default_factory=list)

    def renew(self, home: Home, comparison: Comparison | None) -> bool:
        """Compare as `comparison` does from now on, if this copies to that home and compares the very same chunks."""
        if self.home.base != home.base:
            return False
        if self.comparison is None or comparison is None:
            return self.comparison is comparison
        return self.comparison.renew(comparison)


def program_of(
    plan: PartPlan,
    eager: Iterable[int],
    late: Iterable[int],
    home: Home,
    arena: Arena,
    comparison: Comparison | None,
) -> Program:
    """Copies the sources `eager` of the plan at once, and those that are `late` behind the fence.

    A chunk of both is hashed only where it is compared, and then at once: it need not be copied at all.
    """
    program = Program(home, comparison)
    copy_of: CopyOf = (lambda chunk: chunk.copy) if comparison is None else comparison.copies(plan, CHUNK_SIZE)
    at_once, waiting = (
        pieces(plan, [i for i in which if plan.sources[i].data.device.type != "cuda"], home.base, arena)
        for which in (eager, late)
    )
    waits = {piece.offset for piece in waiting}
    for these in by_chunks(sorted(at_once + waiting, key=lambda piece: piece.offset), home, CHUNK_SIZE):
        count = sum(piece.offset in waits for piece in these.pieces)
        if isinstance(these, Chunk) and (comparison is not None or count in (0, len(these.pieces))):
            (program.late if count == len(these.pieces) else program.eager).append(these.as_piece(copy_of(these)))
            continue
        for piece in these.pieces:
            (program.late if piece.offset in waits else program.eager).append(piece)
    return program
