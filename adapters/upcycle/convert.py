"""Upcycling a checkpoint on disk: plan, stream, verify, commit; all or nothing."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import moezoo
from moezoo.adapters.checkpoint_source import CheckpointSource, open_checkpoint
from moezoo.adapters.direct import DirectWriter
from moezoo.adapters.open_files import OpenFiles
from moezoo.adapters.plan import Plan, make_plan
from moezoo.adapters.tensor_files import TensorFile, shard, shard_index
from moezoo.adapters.upcycle.background import Flusher
from moezoo.adapters.upcycle.carried import carry_files, dtype_word, source_places, write_text
from moezoo.adapters.upcycle.partial import partial_directory
from moezoo.adapters.upcycle.provenance import Provenance, model_card, unhashed
from moezoo.adapters.upcycle.recipe import Recipe
from moezoo.adapters.upcycle.stream import Progress, Sink, transfer
from moezoo.adapters.upcycle.watch import Stamps, folder_hashes, refuse_change, stamps
from moezoo.adapters.writer import checked_target

if TYPE_CHECKING:
    from moezoo.adapters.upcycle.calibration import Calibration

Verifier = Callable[[Path], str]


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did."""

    target: Path
    plan: Plan
    seconds: float
    resumed: bool
    source_sha256: dict[str, str]
    verification: str | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "target": str(self.target),
            "seconds": round(self.seconds, 3),
            "resumed": self.resumed,
            "bytes_read": self.plan.bytes_read,
            "bytes_written": self.plan.bytes_written,
            "parameters": self.plan.parameters,
            "active_parameters": self.plan.active_parameters,
            "expressible": self.plan.expressible,
            "layout_reason": self.plan.layout_reason,
            "wo_scale": self.plan.scale,
            "source_sha256": self.source_sha256,
            "recipe": self.plan.recipe.to_dict(),
            "verification": self.verification,
        }


def convert(
    source_path: str | Path,
    target: str | Path,
    recipe: Recipe,
    *,
    layout: str = "auto",
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    drop_heads: bool = False,
    calibration: Calibration | None = None,
    verifier: Verifier | None = None,
    progress: Progress | None = None,
) -> ConversionReport:
    """Upcycle the checkpoint at `source_path` into the directory `target`.

    Args:
        drop_heads: leave out heads that moezoo's models do not have, such as a classifier's.
        calibration: sample text for router initialisations that need it.
        verifier: called with the finished directory before it is committed; returns its verdict in
            a line, raises to refuse it.
        progress: called with numbers of bytes as they are written.

    Raises CheckpointError, ConfigError or SaveError; the target is then what it was.
    """
    with open_checkpoint(source_path, drop_heads=drop_heads) as checkpoint:
        return carry_out(
            make_plan(checkpoint, recipe, layout=layout),
            checkpoint,
            target,
            overwrite=overwrite,
            allow_nonfinite=allow_nonfinite,
            calibration=calibration,
            verifier=verifier,
            progress=progress,
        )


def carry_out(
    plan: Plan,
    checkpoint: CheckpointSource,
    target: str | Path,
    *,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    calibration: Calibration | None = None,
    verifier: Verifier | None = None,
    progress: Progress | None = None,
) -> ConversionReport:
    """Write what was planned for a checkpoint into the directory `target`; see `convert`."""
    started = time.monotonic()
    needed = plan.bytes_written
    places = source_places(checkpoint.source)
    final = checked_target(target, overwrite=overwrite, sources=places, bytes_needed=needed)
    before = stamps(checkpoint.source)
    digest = _digest(plan, before)
    with partial_directory(
        final, plan_digest=digest, overwrite=overwrite, bytes_needed=needed
    ) as partial:
        hashes = _fill(
            plan,
            checkpoint,
            partial.path,
            partial.resumed,
            allow_nonfinite,
            calibration,
            progress,
        )
        refuse_change(checkpoint.source, before)
        provenance = unhashed(plan, checkpoint.source, calibration).with_hashes(hashes)
        write_description(partial.path, plan, checkpoint, provenance, None)
        verdict = None if verifier is None else verifier(partial.path)
        if verdict is not None:
            write_description(partial.path, plan, checkpoint, provenance, verdict)
    seconds = time.monotonic() - started
    return ConversionReport(final, plan, seconds, partial.resumed, hashes, verdict)


def write_description(
    directory: Path,
    plan: Plan,
    checkpoint: CheckpointSource,
    provenance: Provenance,
    verification: str | None,
) -> None:
    """config.json, the recipe, the model card, and the source's tokenizer files byte for byte."""
    made = {**provenance.to_dict(), "verification": verification}
    values = {**plan.family.write(plan.config, plan.task), "moezoo_provenance": made}
    values["dtype"] = dtype_word(plan.outputs())
    write_text(directory / "config.json", json.dumps(values, indent=2, sort_keys=True))
    write_text(directory / "recipe.json", plan.recipe.to_json())
    write_text(directory / "README.md", model_card(plan, checkpoint, provenance, verification))
    carry_files(checkpoint, directory)


def _fill(
    plan: Plan,
    checkpoint: CheckpointSource,
    directory: Path,
    resumed: bool,
    allow_nonfinite: bool,
    calibration: Calibration | None,
    progress: Progress | None,
) -> dict[str, str]:
    inputs = None
    if plan.router_init.needs_inputs:
        from moezoo.adapters.upcycle.calibration import layer_inputs

        inputs = layer_inputs(checkpoint, calibration, list(plan.routers))
    provenance = unhashed(plan, checkpoint.source, calibration)
    shards = shard(plan.outputs(), plan.recipe.max_shard_size)
    files: dict[str, TensorFile] = {}
    opened = OpenFiles()
    try:
        for name, group in shards.items():
            files[name] = TensorFile(
                directory / name, group, provenance.metadata(), direct=not resumed, files=opened
            )
        home = {tensor.name: files[name] for name, group in shards.items() for tensor in group}
        with Flusher() as flusher, DirectWriter() as direct:
            sink = Sink(home, resumed, progress or (lambda _: None), flusher, direct)
            hashes = transfer(
                plan, checkpoint.source, sink, allow_nonfinite=allow_nonfinite, inputs=inputs
            )
        hashes |= folder_hashes(checkpoint.source)
        for file in files.values():
            file.rewrite_metadata(provenance.with_hashes(hashes).metadata())
            file.close()
    finally:
        for file in files.values():
            file.abandon()
    if len(shards) > 1:
        (directory / "model.safetensors.index.json").write_bytes(shard_index(shards))
    return hashes


def _digest(plan: Plan, before: Stamps) -> str:
    facts = [moezoo.__version__, plan.recipe.to_dict(), plan.config.to_dict(), before]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
