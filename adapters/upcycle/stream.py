"""Executing a plan: bytes read once and written once, in the order of the source's files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moezoo.adapters.direct import LENT, PAGE, DirectWriter, Pages
from moezoo.adapters.formats import Source
from moezoo.adapters.plan import Move, Plan
from moezoo.adapters.tensor_files import TensorFile, TensorPlan
from moezoo.adapters.upcycle.background import HANDED, FileHashes, Flusher, ahead
from moezoo.adapters.upcycle.drawing import router_bytes
from moezoo.adapters.upcycle.finite import check_finite
from moezoo.adapters.upcycle.scaling import scale_bytes
from moezoo.adapters.upcycle.slicing import cut, period, slice_targets

if TYPE_CHECKING:
    from moezoo.adapters.upcycle.calibration import LayerInputs

CHUNK = 1 << 18  # small enough to stay in the processor's cache while every expert is written
_SCALED = 1 << 16  # of more, the C library gives the memory back to the system each time
_WORTH_LENDING = 1 << 18  # smaller tensors are gathered
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Sink:
    """Where the parts of tensors go: `home` is the file that holds each tensor."""

    home: Mapping[str, TensorFile]
    resumed: bool
    progress: Progress
    flusher: Flusher
    direct: DirectWriter

    def put(self, names: Sequence[str], content: bytes | memoryview, offset: int = 0) -> None:
        """Write the same part of some tensors: past the cache where that can be; after a kill,
        only where the file does not hold it already.
        """
        places = []
        for name in names:
            file = self.home[name]
            if file.direct is not None and not self.resumed:
                places.append((file.direct, file.claim(name, len(content), offset)))
                continue
            if not (self.resumed and file.holds(name, content, offset)):
                file.put(name, content, offset)
            self.flusher.wrote(file, len(content))
        self.direct.write(places, content)
        self.progress(len(content) * len(names))

    @property
    def lends(self) -> bool:
        """Whether tensors of whole pages can be put by `put_pages`."""
        return not self.resumed and all(file.direct for file in self.home.values())

    def put_pages(self, names: Sequence[str], pages: Pages, size: int, offset: int) -> None:
        """Write the same pages of some tensors, past the cache and without a copy."""
        places = []
        for name in names:
            file = self.home[name]
            assert file.direct is not None
            places.append((file.direct, file.claim(name, size, offset)))
        self.direct.write_pages(places, pages, size)
        self.progress(size * len(names))


def transfer(
    plan: Plan,
    source: Source,
    sink: Sink,
    *,
    allow_nonfinite: bool = False,
    inputs: LayerInputs | None = None,
) -> dict[str, str]:
    """Write every tensor of the plan; returns the sha256 of every source file.

    Raises NonFiniteWeights naming a tensor that holds NaN or infinity.
    """
    for layer, target in plan.routers.items():
        sample = None if inputs is None else inputs[layer]
        sink.put([target.name], router_bytes(plan, layer, target, sample))
        for constant in plan.constants.get(layer, ()):
            sink.put([constant.name], plan.constant(constant))
    pending = {move.layer for move in plan.moves}
    with (
        FileHashes(source) as hashes,
        closing(
            ahead(
                _pieces(plan, source, sink, hashes, allow_nonfinite), at_once=HANDED, size=_weight
            )
        ) as pieces,
        sink.direct.lending(),
    ):
        for piece in pieces:
            if piece.content is None:
                _compute(plan, piece.move, source, sink, pending)
                continue
            names = [target.name for target in piece.targets]
            if piece.pages is not None:
                sink.put_pages(names, piece.pages, len(piece.content), piece.position)
            else:
                sink.put(names, piece.content, piece.position)
        sink.direct.finish()
        return hashes.finished()


@dataclass(frozen=True)
class _Piece:
    """Bytes as they go to some targets of a move; None: the whole tensor is to be computed.
    `pages`: the lent memory that begins with them.
    """

    move: Move
    content: bytes | memoryview | None
    position: int = 0
    targets: tuple[TensorPlan, ...] = ()
    pages: Pages | None = None


def _weight(piece: _Piece) -> int:
    """Bytes of memory. What is lent is handed on at once: who waits for more of it would never
    get it back.
    """
    if piece.pages is not None:
        return HANDED
    return CHUNK if piece.content is None else len(piece.content)


def _pieces(
    plan: Plan, source: Source, sink: Sink, hashes: FileHashes, allow_nonfinite: bool
) -> Iterator[_Piece]:
    """What is to be written, read from the source in the order of its files."""
    moves = {move.source.name: move for move in plan.moves}
    lends = sink.lends
    for name, info in source.tensors.items():
        move = moves.get(name)
        if lends and move is not None and _is_pages(plan, move):
            yield from _lent_pieces(move, source, sink.direct, hashes, allow_nonfinite)
            continue
        streamed = move is not None and _is_bytes(plan, move)
        count, owners = slice_targets(plan, move) if move and streamed else (1, {})
        position = 0
        for content in source.chunks(name, CHUNK):
            hashes.update(info.path, content)
            if move is not None:
                if not allow_nonfinite:
                    check_finite(content, info.dtype, name, source.path)
                if move.shared is not None and move.shared.dtype == info.dtype:
                    common = scale_bytes(content, info.dtype, move.shared_scale)
                    yield _Piece(move, common, position, (move.shared,))
                if streamed:
                    scaled = scale_bytes(content, info.dtype, move.scale)
                    for which, at, part in cut(scaled, position, period=period(move), count=count):
                        yield _Piece(move, part, at, owners[which])
            position += len(content)
        if move is not None and not streamed:
            yield _Piece(move, None)


def _lent_pieces(
    move: Move, source: Source, direct: DirectWriter, hashes: FileHashes, allow_nonfinite: bool
) -> Iterator[_Piece]:
    """A tensor that goes whole to each of its targets, in memory that is written from."""
    info = move.source
    for start in range(0, info.nbytes, LENT):
        pages, size = direct.lend(), min(LENT, info.nbytes - start)
        content = memoryview(pages.memory)[:size]
        source.fill(content, info.name, start)
        hashes.update(info.path, content, pages)
        if not allow_nonfinite:
            whole = pages.memory if size == LENT else content
            check_finite(whole, info.dtype, info.name, source.path)
        if move.scale != 1.0:
            scaled = direct.lend()
            for at in range(0, size, _SCALED):
                part = scale_bytes(content[at : at + _SCALED], info.dtype, move.scale)
                scaled.memory[at : at + len(part)] = part
            pages.release()
            pages, content = scaled, memoryview(scaled.memory)[:size]
        yield _Piece(move, content, start, move.targets, pages)


def _is_pages(plan: Plan, move: Move) -> bool:
    """Whether a tensor is whole pages that go to each of its targets, but for a factor."""
    size = move.source.nbytes
    alone = move.shared is None
    whole = alone and move.source.path is not None and size >= _WORTH_LENDING and size % PAGE == 0
    return whole and _is_bytes(plan, move) and slice_targets(plan, move)[0] == 1


def _is_bytes(plan: Plan, move: Move) -> bool:
    same_dtype = move.source.dtype == move.targets[0].dtype
    return same_dtype and (move.layer is None or plan.init.streams)


def _compute(plan: Plan, move: Move, source: Source, sink: Sink, pending: set[str | None]) -> None:
    """What bytes cannot do: other dtypes, and initialisations with arithmetic."""
    from moezoo.adapters.upcycle import drawing

    if move.shared is not None and move.shared.dtype != move.source.dtype:
        content = drawing.converted(source, move, move.shared_scale)
        sink.put([move.shared.name], content)
    if move.layer is None:
        sink.put([target.name for target in move.targets], drawing.converted(source, move))
    elif move.layer in pending:
        pending.discard(move.layer)
        for name, content in drawing.expert_tensors(plan, move.layer, (source,)):
            sink.put([name], content)
