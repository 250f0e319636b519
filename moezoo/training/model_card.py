"""The model card that a training run writes beside its model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from moezoo.adapters.card import card
from moezoo.training.recipes import TrainingRecipe
from moezoo.training.run import RunResult


def run_card(
    model: nn.Module,
    settings: TrainingRecipe,
    arguments: argparse.Namespace,
    facts: Mapping[str, Any],
    result: RunResult,
) -> Callable[[Path], str]:
    """The model card of a finished run, for the directory that its model was written to.

    Args:
        arguments: of the verb that trained. facts: what else decided the numbers: the task.
    """
    config: Any = model.config
    tuned = "task" in facts
    source = getattr(arguments, "source", None) or arguments.teacher
    rows: dict[str, object] = {
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "experts per sparse layer": config.num_experts or "none: a dense model",
        "trained": f"{result.state.step:,} steps of {arguments.batch_size} examples",
        "objective": f"pairs, task {facts['task']}" if tuned else "span corruption",
    }
    if tuned:
        rows["put before every source"] = f"`{facts['prefix']}`" if facts["prefix"] else "nothing"
    rows |= {f"held-out nats per token, step {n}": f"{x:.4f}" for n, x in result.held_out.items()}
    named = Path(source).resolve().name if source else arguments.model or "a model of its own"
    recipe = json.dumps(asdict(settings), indent=2, sort_keys=True)

    def text(written: Path) -> str:
        kind = json.loads((written / "config.json").read_text(encoding="utf-8"))["model_type"]
        return card(
            f"{named}, {'fine-tuned' if tuned else 'pre-trained'}",
            rows,
            sources=[Path(source)] if source else [],
            model_type=kind,
            task="conditional_generation",
            relation="finetune",
            parts=[f"## How it was trained\n\n```json\n{recipe}\n```"],
        )

    return text
