"""The last part of the demo: its Switch model as a run directory, and the page of its routing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from moezoo.adapters.checkpoint import load
from moezoo.demonstration.text import Material
from moezoo.reporting.report import report
from moezoo.reporting.trial import Trial
from moezoo.training.checkpoints import json_row
from moezoo.training.loop import StepRecord
from moezoo.training.session import save_with_tokenizer

BATCHES = 4  # of held-out text on the page


def keep_run(
    directory: Path,
    model: nn.Module,
    material: Material,
    records: Sequence[StepRecord],
    measured: Trial,
) -> Path:
    """Write what a training verb would have left: metrics.jsonl, and the model with its
    tokenizer.
    """
    directory.mkdir(parents=True, exist_ok=True)
    rows = [json_row(record) for record in records]
    rows += [{"step": step, "held_out": loss} for step, loss in measured.held_out]
    rows.sort(key=lambda row: int(row["step"]))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_with_tokenizer(model, material.tokenizer, directory / "model")
    return directory


def routing_page(path: Path, model: nn.Module, dense: Path, material: Material, run: Path) -> Path:
    """The page of a trained Switch model on held-out text, beside the dense model that it was made
    from.
    """
    count = min(BATCHES, material.held_out.batches_per_epoch)
    made = report(
        model,
        (material.held_out(step) for step in range(count)),
        tokenizer=material.tokenizer,
        run=run,
        against=load(dense),
        against_name="the dense T5 that it was made from",
        title="The demo's Switch model",
    )
    return made.save(path)
