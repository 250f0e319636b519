"""Cutting a matrix into slices of its hidden units while it passes as bytes. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from moezoo.adapters.plan import Move, Plan
from moezoo.adapters.tensor_files import TensorPlan


def slice_targets(plan: Plan, move: Move) -> tuple[int, dict[int, tuple[TensorPlan, ...]]]:
    """How many slices a moved matrix is cut into, and who gets each of them."""
    if move.layer is None:
        return 1, {0: move.targets}
    count, owners = 1, dict[int, tuple[TensorPlan, ...]]()
    for expert, target in enumerate(move.targets):
        which, count = plan.init.part(expert, len(move.targets))
        owners[which] = (*owners.get(which, ()), target)
    return count, owners


def period(move: Move) -> int:
    """After how many bytes the slices of a matrix begin anew: the hidden units are the columns of
    `wo` and the rows of the others.
    """
    source = move.source
    return source.nbytes // source.shape[0] if move.matrix == "wo" else source.nbytes


def cut(
    content: bytes | memoryview, position: int, *, period: int, count: int
) -> Iterator[tuple[int, int, bytes | memoryview]]:
    """The bytes from `position` on as (slice, offset in that slice, bytes), each slice once.

    Every `period` bytes are `count` equal parts, one of each slice; what a slice gets of a stretch
    of the source is a stretch of its own.
    """
    if count == 1:
        yield 0, position, content
        return
    part, view, done = period // count, memoryview(content), 0
    pieces: dict[int, list[memoryview]] = {}
    starts: dict[int, int] = {}
    while done < len(view):
        turn, inside = divmod(position + done, period)
        which, offset = divmod(inside, part)
        length = min(part - offset, len(view) - done)
        starts.setdefault(which, turn * part + offset)
        pieces.setdefault(which, []).append(view[done : done + length])
        done += length
    for which, found in pieces.items():
        yield which, starts[which], b"".join(found)
