"""Checkpoints of a run: atomic, and enough to continue bit for bit."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from moezoo.adapters.checkpoint import load, save
from moezoo.adapters.writer import replacing_directory
from moezoo.errors import CorruptFile, NonFiniteLoss, ResumeMismatch
from moezoo.training.loop import StepRecord, TrainingState

FORMAT = 1
_NAME = "step-{:08d}"


def save_checkpoint(
    state: TrainingState, directory: str | Path, settings: Mapping[str, Any], *, keep: int = 2
) -> Path:
    """Write `directory/step-N`: model, optimizer, schedule, random numbers, settings, thread count.

    Written beside its place and renamed, so that a kill leaves the last good one. Of older
    checkpoints, `keep - 1` stay. Raises SaveError when writing fails, NonFiniteLoss naming a weight
    that is NaN or infinite; either way the last good one stays.
    """
    for name, parameter in state.model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            reason = f"step {state.step}: weight {name} is not finite, so it is not saved"
            raise NonFiniteLoss(reason, key=name, hint="Lower the learning rate.")
    target = Path(directory) / _NAME.format(state.step)
    with replacing_directory(target, overwrite=True) as stage:
        save(state.model, stage / "model")
        rest = {
            "optimizer": state.optimizer.state_dict(),
            "schedule": _plain(state.schedule.state_dict()),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "training": state.model.training,
        }
        # Given a path, torch writes by itself and calls a full disk a RuntimeError.
        with (stage / "training.pt").open("wb") as file:
            torch.save(rest, file)
        facts = {
            "format": FORMAT,
            "step": state.step,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "settings": dict(settings),
        }
        text = json.dumps(facts, indent=2, sort_keys=True) + "\n"
        (stage / "training.json").write_text(text, encoding="utf-8")
    for old in checkpoints(directory)[: -max(keep, 1)]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def checkpoints(directory: str | Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = Path(directory).glob("step-*")
    return sorted(path for path in found if (path / "training.json").is_file())


def restore(
    state: TrainingState,
    path: str | Path,
    settings: Mapping[str, Any],
    *,
    strict: bool = True,
    free: Collection[str] = (),
) -> None:
    """Put a checkpoint into a fresh state of the same model and recipe; training then continues bit
    for bit.

    Args:
        strict: refuse other settings, another thread count or another torch, which change the sums.
            Otherwise the recipe and the schedule that the state was made with take effect.
        free: settings that may differ all the same, because no number depends on them.

    Raises ResumeMismatch naming the field, CheckpointError for files that are missing or corrupt.
    """
    path = Path(path)
    facts = read_facts(path)
    found = {**facts["settings"], "threads": facts["threads"], "torch": facts["torch"]}
    now = {**settings, "threads": torch.get_num_threads(), "torch": torch.__version__}
    for name in sorted((found.keys() | now.keys()) - set(free)) if strict else []:
        old, new = found.get(name), json.loads(json.dumps(now.get(name)))
        if old != new:
            hint = "Continue with the same setting, or pass --allow-changes."
            raise ResumeMismatch(
                f"{name} is not what the run was started with",
                path=path,
                key=name,
                expected=old,
                found=new,
                hint=hint,
            )
    model = load(path / "model", allow_nonfinite=True)
    state.model.load_state_dict(model.state_dict())
    try:
        rest = torch.load(path / "training.pt", weights_only=True)
    except Exception as error:  # a corrupt file fails in any part of the reader
        reason = f"cannot be read: {type(error).__name__}"
        raise CorruptFile(reason, path=path / "training.pt") from None
    _restore_optimizer(state, rest, int(facts["step"]), strict=strict)
    torch.set_rng_state(rest["random"])
    if rest.get("random_cuda") and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(rest["random_cuda"])
    state.model.train(rest["training"])
    state.step = int(facts["step"])


def _restore_optimizer(
    state: TrainingState, rest: Mapping[str, Any], step: int, *, strict: bool
) -> None:
    """The optimizer's memory and the schedule's place; rates are the checkpoint's when strict."""
    fresh = [dict(group) for group in state.optimizer.param_groups]
    try:
        state.optimizer.load_state_dict(rest["optimizer"])
    except ValueError as error:
        hint = "Start another run from the model of the checkpoint, with --from."
        raise ResumeMismatch(f"the optimizer differs: {error}", key="recipe", hint=hint) from None
    if strict:
        state.schedule.load_state_dict(rest["schedule"])
        return
    for group, new in zip(state.optimizer.param_groups, fresh, strict=True):
        group.update({name: value for name, value in new.items() if name != "params"})
    state.schedule.last_epoch = step
    factors = zip(
        state.optimizer.param_groups,
        state.schedule.base_lrs,
        state.schedule.lr_lambdas,
        strict=True,
    )
    for group, rate, factor in factors:
        group["lr"] = rate * factor(step)
    state.schedule._last_lr = [group["lr"] for group in state.optimizer.param_groups]


def read_facts(path: Path) -> dict[str, Any]:
    """training.json of a checkpoint. Raises CorruptFile, ResumeMismatch for a newer format."""
    try:
        facts = json.loads((path / "training.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptFile(f"training.json cannot be read: {error}", path=path) from None
    if not isinstance(facts, dict) or not isinstance(facts.get("format"), int):
        raise CorruptFile("training.json is no training checkpoint", path=path)
    if facts["format"] > FORMAT:
        hint, found = "Update moezoo.", facts["format"]
        raise ResumeMismatch(
            "written by a newer moezoo", path=path, expected=FORMAT, found=found, hint=hint
        )
    return facts


def _plain(schedule: dict[str, Any]) -> dict[str, Any]:
    """The schedule without its functions, which settings rebuild."""
    return {name: value for name, value in schedule.items() if name != "lr_lambdas"} | {
        "lr_lambdas": [None for _ in schedule["lr_lambdas"]]
    }


def json_row(record: StepRecord) -> dict[str, Any]:
    """A record as JSON values; NaN becomes null."""
    row = dataclasses.asdict(record)
    # Thousands of numbers in a large model: `dead` counts them, and here each layer's.
    idle = Counter(layer for layer, _ in row.pop("idle"))
    row["dead_by_layer"] = {str(layer): idle[layer] for layer in sorted(idle)}
    if not record.culprit:
        row.pop("culprit")
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
