"""The pace, and the stretches that a file is copied in."""

from hypothesis import given
from hypothesis import strategies as st

from asyncckpt.format.pieces import PAGE
from asyncckpt.write.copying import Piece, stretches
from asyncckpt.write.mirror import Pace


@given(st.lists(st.tuples(st.integers(1, 1 << 20), st.integers(0, 1 << 20)), max_size=20))
def test_the_rate_is_kept_over_every_span_of_time(sizes):
    now, rate, sent = 0.0, float(1 << 20), []
    pace = Pace(rate, lambda: now)
    for size, idle in sizes:
        now += idle / rate
        now += pace.reserve(size)
        sent.append((now, size))
    for i, (start, first) in enumerate(sent):
        for j in range(i, len(sent)):
            later = sum(size for _, size in sent[i : j + 1])
            assert later <= rate * (sent[j][0] - start) + max(size for _, size in sent[i : j + 1]) + 1e-3, first


def test_without_a_rate_nothing_waits():
    assert Pace(None).reserve(1 << 40) == 0.0


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3 * PAGE)), max_size=10), st.integers(0, 2 * PAGE))
def test_stretches_cover_a_file_and_begin_at_pages(layout, tail):
    pieces, position = [], 0
    for gap, size in layout:
        offset = -(-position // PAGE) * PAGE + gap * PAGE
        pieces.append(Piece(offset, size, ""))
        position = offset + size
    found = list(stretches(position + tail, reversed(pieces)))
    assert [s.piece for s in found if s.piece is not None] == pieces
    assert all(s.start % PAGE == 0 and (s.piece is None or s.end >= s.start + s.piece.size) for s in found)
    ends = [0, *(s.end for s in found)]
    assert [s.start for s in found] == ends[:-1] and ends[-1] == position + tail
