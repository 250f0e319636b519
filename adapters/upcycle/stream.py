"""Executing a plan: bytes read once and written once, in the order of the source's files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

from moezoo.adapters.direct import DirectWriter
from moezoo.adapters.formats import Source
from moezoo.adapters.plan import Move, Plan
from moezoo.adapters.tensor_files import TensorFile, TensorPlan
from moezoo.adapters.upcycle.background import FileHashes, Flusher, ahead
from moezoo.adapters.upcycle.calibration import LayerInputs
from moezoo.adapters.upcycle.drawing import router_bytes
from moezoo.adapters.upcycle.finite import check_finite
from moezoo.adapters.upcycle.scaling import scale_bytes
from moezoo.adapters.upcycle.slicing import cut, period, slice_targets

CHUNK = 1 << 18  # small enough to stay in the processor's cache while every expert is written
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
    pending = {move.layer for move in plan.moves}
    with (
        FileHashes(source) as hashes,
        closing(ahead(_pieces(plan, source, hashes, allow_nonfinite))) as pieces,
    ):
        for piece in pieces:
            if piece.content is None:
                _compute(plan, piece.move, source, sink, pending)
                continue
            names = [target.name for target in piece.targets]
            sink.put(names, piece.content, piece.position)
        sink.direct.finish()
        return hashes.finished()


@dataclass(frozen=True)
class _Piece:
    """Bytes as they go to some targets of a move; None: the whole tensor is to be computed."""

    move: Move
    content: bytes | memoryview | None
    position: int = 0
    targets: tuple[TensorPlan, ...] = ()


def _pieces(
    plan: Plan, source: Source, hashes: FileHashes, allow_nonfinite: bool
) -> Iterator[_Piece]:
    """What is to be written, read from the source in the order of its files."""
    moves = {move.source.name: move for move in plan.moves}
    for name, info in source.tensors.items():
        move = moves.get(name)
        streamed = move is not None and _is_bytes(plan, move)
        count, owners = slice_targets(plan, move) if move and streamed else (1, {})
        position = 0
        for content in source.chunks(name, CHUNK):
            hashes.update(info.path, content)
            if move is not None:
                if not allow_nonfinite:
                    check_finite(content, info.dtype, name, source.path)
                if streamed:
                    scaled = scale_bytes(content, info.dtype, move.scale)
                    for which, at, part in cut(scaled, position, period=period(move), count=count):
                        yield _Piece(move, part, at, owners[which])
            position += len(content)
        if move is not None and not streamed:
            yield _Piece(move, None)


def _is_bytes(plan: Plan, move: Move) -> bool:
    same_dtype = move.source.dtype == move.targets[0].dtype
    return same_dtype and (move.layer is None or plan.init.streams)


def _compute(plan: Plan, move: Move, source: Source, sink: Sink, pending: set[str | None]) -> None:
    """What bytes cannot do: other dtypes, and initialisations with arithmetic."""
    from moezoo.adapters.upcycle import drawing

    if move.layer is None:
        sink.put([move.targets[0].name], drawing.converted(source, move))
    elif move.layer in pending:
        pending.discard(move.layer)
        for name, content in drawing.expert_tensors(plan, move.layer, (source,)):
            sink.put([name], content)
