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
from torch import nn

from moezoo.adapters.checkpoint import load, save
from moezoo.errors import CorruptFile, NonFiniteLoss, ResumeMismatch
from moezoo.functional.collective import num_ranks, rank
from moezoo.functional.shards import is_divided, local_of, unwrapped
from moezoo.training.loop import StepRecord, TrainingState
from moezoo.training.ranks import first_of_ranks, seed_of_step
from moezoo.training.sharded import (
    FOLDER,
    placed_memory,
    placed_whole,
    read_parts,
    write_parts,
    written_together,
)

FORMAT = 2  # 2: by several ranks; what one process writes is of format 1
_NAME = "step-{:08d}"


def save_checkpoint(
    state: TrainingState, directory: str | Path, settings: Mapping[str, Any], *, keep: int = 2
) -> Path:
    """Write `directory/step-N`: model, optimizer, schedule, random numbers, settings, thread count.

    Written beside its place and renamed, so that a kill leaves the last good one. Of older
    checkpoints, `keep - 1` stay. Where several ranks train, all call it, each writes its own parts,
    and any number of ranks goes on from it. Raises SaveError when writing fails, NonFiniteLoss
    naming a weight that is NaN or infinite; either way the last good one stays.
    """
    parameters = state.model.named_parameters()
    bad = (name for name, p in parameters if not bool(torch.isfinite(local_of(p)).all()))
    name = first_of_ranks(next(bad, ""))
    if name:
        reason = f"step {state.step}: weight {name} is not finite, so it is not saved"
        raise NonFiniteLoss(reason, key=name, hint="Lower the learning rate.")
    target = checkpoint_of(directory, state.step)

    def write(stage: Path) -> None:
        if num_ranks() == 1:
            save(state.model, stage / "model")
        else:
            write_parts(state.model, state.optimizer, stage / FOLDER)
        if rank() == 0:
            _write_rest(state, stage, settings)

    written_together(target, write)
    for old in checkpoints(directory)[: -max(keep, 1)] if rank() == 0 else ():
        shutil.rmtree(old, ignore_errors=True)
    return target


def _write_rest(state: TrainingState, stage: Path, settings: Mapping[str, Any]) -> None:
    """What is the same on all ranks: training.json, and training.pt with the optimizer's settings;
    of one process its memory and the random numbers too.
    """
    optimizer = state.optimizer.state_dict()
    rest = {
        "optimizer": optimizer,
        "schedule": _plain(state.schedule.state_dict()),
        "training": state.model.training,
        "watch": state.watch,
    }
    facts = {
        "format": 1,
        "step": state.step,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "settings": dict(settings),
    }
    if num_ranks() == 1:
        rest["random"] = torch.get_rng_state()
        rest["random_cuda"] = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    else:
        rest["optimizer"] = {**optimizer, "state": {}}
        facts |= {"format": FORMAT, "ranks": num_ranks(), "seed": state.seed}
    # Given a path, torch writes by itself and calls a full disk a RuntimeError.
    with (stage / "training.pt").open("wb") as file:
        torch.save(rest, file)
    text = json.dumps(facts, indent=2, sort_keys=True) + "\n"
    (stage / "training.json").write_text(text, encoding="utf-8")


def checkpoints(directory: str | Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = Path(directory).glob("step-*")
    return sorted(path for path in found if (path / "training.json").is_file())


def checkpoint_of(directory: str | Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return Path(directory) / _NAME.format(step)


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
    if strict:
        _check_settings(facts, settings, path, free)
    try:
        rest = torch.load(path / "training.pt", weights_only=True)
    except Exception as error:  # a corrupt file fails in any part of the reader
        reason = f"cannot be read: {type(error).__name__}"
        raise CorruptFile(reason, path=path / "training.pt") from None
    if facts["format"] > 1:
        rest["optimizer"]["state"] = read_parts(state.model, state.optimizer, path / FOLDER)
        state.seed = int(facts["seed"])
    else:
        _copy_whole(state.model, path / "model")
    _restore_optimizer(state, rest, int(facts["step"]), strict=strict)
    placed_memory(state.optimizer)
    state.model.train(rest["training"])
    state.step = int(facts["step"])
    state.watch = rest.get("watch", {})
    if num_ranks() == 1:
        _restore_random(state, rest)


def _check_settings(
    facts: Mapping[str, Any], settings: Mapping[str, Any], path: Path, free: Collection[str]
) -> None:
    """Raises ResumeMismatch naming a setting that is another one now. Other ranks than before are
    none, and have their own number of threads.
    """
    found = {**facts["settings"], "threads": facts["threads"], "torch": facts["torch"]}
    now = {**settings, "threads": torch.get_num_threads(), "torch": torch.__version__}
    if facts.get("ranks", 1) != num_ranks():
        now["threads"] = found["threads"]
    for name in sorted((found.keys() | now.keys()) - set(free)):
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


def _copy_whole(model: nn.Module, path: Path) -> None:
    """The weights that one process saved; a sharded model takes its parts of them."""
    own = unwrapped(model)
    sharded = {name: t for name, t in own.state_dict().items() if is_divided(t)}
    saved = load(path, allow_nonfinite=True).state_dict()
    own.load_state_dict({**saved, **{n: placed_whole(saved[n], t) for n, t in sharded.items()}})


def _restore_random(state: TrainingState, rest: Mapping[str, Any]) -> None:
    """The random numbers of one process; after several ranks, as of their next step."""
    if "random" not in rest:
        torch.manual_seed(seed_of_step(state.seed, state.step))
        return
    torch.set_rng_state(rest["random"])
    if rest.get("random_cuda") and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(rest["random_cuda"])


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
