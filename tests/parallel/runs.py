"""Training that one process and several ranks do alike: the model, the data, what is compared."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moezoo.parallel import expert_parallel, mesh, shard
from moezoo.training.loop import TrainingState, evaluate, fit, start
from moezoo.training.ranks import batch_of_all_ranks, of_rank
from moezoo.training.recipes import TrainingRecipe
from tests.parallel.ranks import lively, whole_of

STEPS = 6
LOSSES = {"load_balance": 0.05, "z": 0.05}
RECIPES = {
    "adamw": TrainingRecipe("adamw", 1e-2, weight_decay=0.1, clip=0.5),
    "adafactor": TrainingRecipe("adafactor", 1e-2, clip=0.5),
    "accumulated": TrainingRecipe("adamw", 1e-2, accumulate=2),
}


def rows(step: int, *, size: int = 8) -> dict[str, Tensor]:
    """A global batch: sources, targets and padding of other lengths in every row."""
    source = torch.Generator().manual_seed(step)
    ids = torch.randint(2, 60, (size, 7), generator=source)
    labels = torch.randint(2, 60, (size, 6), generator=source)
    mask = torch.ones_like(ids)
    for row in range(size):
        mask[row, 7 - row % 4 :] = 0
        labels[row, 1 + row * 5 // size :] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def model(**overrides: Any) -> nn.Module:
    """float64, dropless: what ranks and one process compute alike."""
    return lively(**{"router_losses": LOSSES, "capacity": "dropless", **overrides})


def state(way: str, settings: TrainingRecipe, *, ep: int = 1, **overrides: Any) -> TrainingState:
    """A fresh state of a model that is divided in a way: "shard", "experts", or "copies" of it all;
    "alone" in one process.
    """
    made = model(**overrides)
    if way in ("alone", "copies"):
        return start(made, settings, steps=STEPS)
    over = mesh(ep, device="cpu")
    if way == "experts":
        return start(expert_parallel(made, over), settings, steps=STEPS, mesh=over)
    return start(shard(made, over), settings, steps=STEPS)


def trained(found: TrainingState, settings: TrainingRecipe, *, until: int = STEPS) -> Any:
    """What the steps say, without their times; the batch is that of all ranks."""
    with batch_of_all_ranks(found.model):
        records = fit(found, of_rank(rows), settings, steps=until)
    return [{k: v for k, v in asdict(record).items() if k != "seconds"} for record in records]


def measured(found: TrainingState) -> dict[str, float]:
    return evaluate(found.model, of_rank(rows), count=2)


def tensors(found: TrainingState) -> dict[str, Tensor]:
    """All weights, buffers and memory of the optimizer, gathered; every rank must call it."""
    named = {name: whole_of(t).clone() for name, t in found.model.state_dict().items()}
    for name, parameter in found.model.named_parameters():
        for key, value in found.optimizer.state[parameter].items():
            named[f"{name}:{key}"] = whole_of(value).clone()
    return named


def reference(folder: Path, name: str) -> dict[str, Any]:
    """What one process found: `records`, `tensors` and `measured`."""
    found: dict[str, Any] = torch.load(folder / f"{name}.pt", weights_only=True)
    return found


def write_references(folder: Path) -> None:
    """Train in this process, for the ranks to compare with."""
    for name, settings in RECIPES.items():
        alone = state("alone", settings)
        found = {"records": trained(alone, settings), "measured": measured(alone)}
        torch.save({**found, "tensors": tensors(alone)}, folder / f"{name}.pt")


def far(one: Any, two: Any) -> float:
    """The largest difference of numbers in nested values, over 1 or the value; sizes must agree."""
    if isinstance(one, dict):
        assert one.keys() == two.keys(), (one.keys(), two.keys())
        return max((far(one[key], two[key]) for key in one), default=0.0)
    if isinstance(one, (list, tuple)):
        assert len(one) == len(two), (one, two)
        return max((far(a, b) for a, b in zip(one, two, strict=True)), default=0.0)
    if isinstance(one, (str, bool)):
        return 0.0 if one == two else float("inf")
    return abs(one - two) / max(1.0, abs(two))
