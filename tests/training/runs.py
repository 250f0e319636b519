"""A small run with everything that a resumed run must get right, and when two runs are the same."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch

import moezoo
from moezoo.training.checkpoints import checkpoints
from moezoo.training.loop import StepRecord
from moezoo.training.recipes import TrainingRecipe
from moezoo.training.run import RunResult, run_training
from tests.training.test_loop import batches
from tests.training.text import small_model

SETTINGS = TrainingRecipe(learning_rate=1e-3, schedule="inverse_sqrt", warmup=3)
STEPS = 12


def noisy_model() -> torch.nn.Module:
    """Dropout and jitter draw random numbers that a resumed run must draw again."""
    return small_model(dropout_rate=0.1, router={"name": "switch", "jitter": 0.01})


def train(directory: Path, *, until: int = STEPS, **options: Any) -> RunResult:
    """Run or go on; `until`: a SIGTERM comes after this step."""

    def maybe_stop(record: StepRecord) -> None:
        if record.step == until < STEPS:
            os.kill(os.getpid(), signal.SIGTERM)

    torch.manual_seed(7)
    return run_training(
        noisy_model(),
        batches(),
        SETTINGS,
        directory,
        steps=STEPS,
        **{
            "held_out": batches(seed=1),
            "held_out_batches": 1,
            "save_every": 4,
            "on_step": maybe_stop,
            **options,
        },
    )


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """The weights of a run's newest checkpoint."""
    return moezoo.load(checkpoints(directory / "checkpoints")[-1] / "model").state_dict()


def measurements(directory: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without their times."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def differences(one: Path, two: Path) -> list[str]:
    """What differs, to the bit, between finished runs: weights, optimizer, random numbers, log."""
    found = []
    expected = weights(two)
    found += [name for name, tensor in weights(one).items() if not same(tensor, expected[name])]
    rests = [
        torch.load(checkpoints(run / "checkpoints")[-1] / "training.pt", weights_only=True)
        for run in (one, two)
    ]
    found += [name for name in rests[0] if not same(rests[0][name], rests[1][name])]
    if measurements(one) != measurements(two):
        found.append("metrics.jsonl")
    return found


def same(one: Any, two: Any) -> bool:
    """Whether two nested values are equal to the bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    return bool(one == two)
