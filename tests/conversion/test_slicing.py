"""Cutting bytes into slices gives what cutting the matrix gives, however the bytes arrive."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moezoo.adapters.upcycle.slicing import cut


@given(
    rows=st.integers(1, 5),
    part=st.integers(1, 6),
    count=st.integers(1, 4),
    sizes=st.lists(st.integers(1, 17), min_size=60, max_size=60),
)
def test_any_chunks_are_cut_like_the_whole_matrix(
    rows: int, part: int, count: int, sizes: list[int]
) -> None:
    columns = part * count
    content = bytes(i % 251 for i in range(rows * columns))
    found = [bytearray() for _ in range(count)]
    position = 0
    for size in sizes * 2:
        chunk = content[position : position + size]
        for which, offset, piece in cut(chunk, position, period=columns, count=count):
            assert offset == len(found[which])
            found[which] += piece
        position += len(chunk)
    assert position == len(content)
    for which, slice_ in enumerate(found):
        lines = [content[r * columns : (r + 1) * columns] for r in range(rows)]
        assert slice_ == b"".join(line[which * part : (which + 1) * part] for line in lines)
