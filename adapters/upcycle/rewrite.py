"""Writing one checkpoint from others, tensor by tensor: the common ground of downcycle, grow,
shrink, merge and export.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moezoo.adapters.checkpoint_source import CheckpointSource
from moezoo.adapters.families import Family, ModelConfig
from moezoo.adapters.formats import Source, TensorInfo
from moezoo.adapters.names import SHARED
from moezoo.adapters.open_files import OpenFiles
from moezoo.adapters.tensor_files import TensorFile, TensorPlan, shard, shard_index
from moezoo.adapters.upcycle.carried import carry_files, dtype_word, source_places, write_text
from moezoo.adapters.upcycle.finite import check_finite
from moezoo.adapters.upcycle.provenance import rewritten, rewritten_card
from moezoo.adapters.upcycle.scaling import scale_bytes
from moezoo.adapters.upcycle.watch import refuse_change, source_hashes, stamps
from moezoo.adapters.writer import checked_target, replacing_directory

CHUNK = 1 << 18


@dataclass(frozen=True)
class Output:
    """A tensor to be written: the bytes of a source tensor, scaled, or what `make` returns. Of a
    source tensor that is longer the beginning is written; after a shorter one, what `tail` returns.
    """

    plan: TensorPlan
    info: TensorInfo | None = None
    scale: float = 1.0
    make: Callable[[], bytes | memoryview] | None = None
    tail: Callable[[], bytes | memoryview] | None = None


def rewrite(
    checkpoint: CheckpointSource,
    target: str | Path,
    outputs: Sequence[Output],
    *,
    config: ModelConfig,
    family: Family,
    operation: Mapping[str, Any],
    others: Sequence[CheckpointSource] = (),
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    max_shard_size: int | str = "5GB",
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Write `outputs` with the config, the tokenizer files of `checkpoint` and what was done.

    Args:
        check: called with the finished directory before it is put in place; raises to refuse it.

    Raises CheckpointError, ConfigError or SaveError; the target is then what it was.
    """
    wanted = dict.fromkeys(family.copies(config, checkpoint.task), SHARED)
    outputs = list(copied(outputs, wanted))
    needed = sum(output.plan.nbytes for output in outputs)
    checkpoints = (checkpoint, *others)
    places = tuple(place for c in checkpoints for place in source_places(c.source))
    final = checked_target(target, overwrite=overwrite, sources=places, bytes_needed=needed)
    before = [stamps(c.source) for c in checkpoints]
    with (
        replacing_directory(final, overwrite=overwrite, bytes_needed=needed) as stage,
        ThreadPoolExecutor(1) as worker,
    ):
        hashing = worker.submit(lambda: [source_hashes(c.source) for c in checkpoints])
        shards = shard((output.plan for output in outputs), max_shard_size)
        begun, opened = _metadata(rewritten(operation, config, checkpoints)), OpenFiles()
        files = [
            TensorFile(stage / name, group, begun, files=opened) for name, group in shards.items()
        ]
        try:
            _write_all(checkpoint.source, outputs, files, allow_nonfinite)
            made = rewritten(operation, config, checkpoints, hashing.result())
            for file in files:
                file.rewrite_metadata(_metadata(made))
                file.close()
        finally:
            for file in files:
                file.abandon()
        if len(shards) > 1:
            (stage / "model.safetensors.index.json").write_bytes(shard_index(shards))
        for c, stamped in zip(checkpoints, before, strict=True):
            refuse_change(c.source, stamped)
        values = family.write(config, checkpoint.task)
        told = "torch_dtype" if "torch_dtype" in values and "dtype" not in values else "dtype"
        values[told] = dtype_word(output.plan for output in outputs)
        plans = [output.plan for output in outputs if output.plan.name not in wanted]
        _describe(stage, values, made, rewritten_card(config, family, plans, made, checkpoints))
        carry_files(checkpoint, stage)
        if check is not None:
            check(stage)
    return final


def copied(outputs: Iterable[Output], names: Mapping[str, str]) -> Iterator[Output]:
    """Some outputs, and copies of them under other names.

    Args:
        names: each new name, and that of the output that it repeats; one that is there is kept.
    """
    made = {output.plan.name: output for output in outputs}
    yield from made.values()
    for name, first in names.items():
        if name not in made and first in made:
            yield replace(made[first], plan=replace(made[first].plan, name=name))


def _describe(stage: Path, values: dict[str, Any], made: Mapping[str, Any], card: str) -> None:
    """config.json with the provenance, and the model card."""
    values = {**values, "moezoo_provenance": made}
    write_text(stage / "config.json", json.dumps(values, indent=2, sort_keys=True))
    write_text(stage / "README.md", card)


def _metadata(made: Mapping[str, Any]) -> dict[str, str]:
    return {"format": "pt", "moezoo": json.dumps(made, sort_keys=True)}


def _write_all(
    source: Source, outputs: Sequence[Output], files: Sequence[TensorFile], allow_nonfinite: bool
) -> None:
    home = {name: file for file in files for name in file.tensors}
    for output in outputs:
        _write(source, output, home[output.plan.name], allow_nonfinite)


def _write(source: Source, output: Output, file: TensorFile, allow_nonfinite: bool) -> None:
    if output.info is None:
        assert output.make is not None
        content = memoryview(output.make())
        for start in range(0, 0 if allow_nonfinite else len(content), CHUNK):
            part = content[start : start + CHUNK]
            check_finite(part, output.plan.dtype, output.plan.name, source.path)
        file.put(output.plan.name, content)
        return
    info, position, size = output.info, 0, output.plan.nbytes
    for whole in source.chunks(info.name, CHUNK):
        chunk = whole[: size - position]
        if not chunk:
            break
        if not allow_nonfinite:
            check_finite(chunk, info.dtype, info.name, source.path)
        file.put(output.plan.name, scale_bytes(chunk, info.dtype, output.scale), position)
        position += len(chunk)
    if output.tail is not None and position < size:
        file.put(output.plan.name, output.tail(), position)
