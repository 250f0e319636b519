"""Several fine-tuned dense models of one shape become the experts of one (2403.07816)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moezoo.adapters.checkpoint_source import CheckpointSource, open_checkpoint
from moezoo.adapters.families import DecoderConfig
from moezoo.adapters.formats.base import tensor_bytes
from moezoo.adapters.formats.files import read_json
from moezoo.adapters.plan import Move, Plan, make_plan
from moezoo.adapters.upcycle.calibration import Calibration, LayerInputs, layer_inputs
from moezoo.adapters.upcycle.drawing import cast, router_bytes
from moezoo.adapters.upcycle.finite import check_finite
from moezoo.adapters.upcycle.recipe import Recipe
from moezoo.adapters.upcycle.rewrite import Output, rewrite
from moezoo.adapters.upcycle.scaling import scale_bytes
from moezoo.errors import ConfigError
from moezoo.tokenizer_files import MAX_BYTES, MODEL_FILES

if TYPE_CHECKING:
    from torch import Tensor


_NEW = {"attention": "full_attention", "mamba": "linear_attention"}  # of old files' layer_types
# What decoders may differ in: how generation begins and ends, and what only a training begins with.
# The first model's is taken.
_FREE = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "attention_dropout")


def merge(
    paths: Sequence[str | Path],
    out: str | Path,
    recipe: Recipe,
    *,
    layout: str = "auto",
    overwrite: bool = False,
    drop_heads: bool = False,
    calibration: Calibration | None = None,
) -> Path:
    """Make the feed-forward networks of several models the experts of one (Branch-Train-MiX).

    Expert e is branch e modulo their number; everything else is averaged. Equal branches give what
    `upcycle` gives for one.

    Args:
        drop_heads: leave out heads that moezoo's models do not have, such as a classifier's.
        calibration: sample text for routers fitted to it; the first model reads it.

    Raises ConfigError for fewer than two models, models of different shape, or an `init` other than
    `branches`.
    """
    if len(paths) < 2:
        raise ConfigError("merge needs at least two models", field="sources", found=len(paths))
    if recipe.init != "branches":
        raise ConfigError(
            "merge takes its experts from the branches", field="init", found=recipe.init,
            hint="Leave init out.",
        )  # fmt: skip
    with ExitStack() as stack:
        branches = [
            stack.enter_context(open_checkpoint(path, drop_heads=drop_heads)) for path in paths
        ]
        _check_alike(branches)
        plan = make_plan(branches[0], recipe, layout=layout)
        operation: dict[str, Any] = {"operation": "merge", "recipe": plan.recipe.to_dict()}
        inputs: LayerInputs = {}
        if plan.router_init.needs_inputs:
            inputs = layer_inputs(branches[0], calibration, list(plan.routers))
            operation["calibration_sha256"] = calibration.sha256() if calibration else None
        return rewrite(
            branches[0],
            out,
            list(_outputs(plan, branches, inputs)),
            config=plan.config,
            family=plan.family,
            operation=operation,
            others=branches[1:],
            overwrite=overwrite,
            max_shard_size=recipe.max_shard_size,
        )


def _check_alike(branches: Sequence[CheckpointSource]) -> None:
    for other in branches[1:]:
        first, found = _facts(branches[0]), _facts(other)
        name = next((n for n in {**first, **found} if first.get(n) != found.get(n)), None)
        if name is not None:
            raise ConfigError(
                f"the models differ in shape or kind: {name}",
                field="sources",
                path=other.source.directory / "config.json",
                expected=f"{first.get(name)!r}, a config like that of {branches[0].path}"[:200],
                found=repr(found.get(name))[:80],
                hint="Merge models that were fine-tuned from one.",
            )  # fmt: skip
        file = _other_tokens(branches[0].source.directory, other.source.directory)
        if file is not None:
            raise ConfigError(
                "the models have different tokens, whose embeddings no average joins",
                field="sources", path=other.source.directory / file,
                expected=f"the vocabulary of {branches[0].path}"[:200],
                hint="Merge models that were fine-tuned from one.",
            )  # fmt: skip


def _other_tokens(first: Path, other: Path) -> str | None:
    """The file by which two directories give ids to other pieces; None where none is in both, and
    for tokens that were added.
    """
    for name in ("tokenizer.json", *MODEL_FILES):
        if (first / name).is_file() and (other / name).is_file():
            one, two = (_pieces(folder / name) for folder in (first, other))
            return None if one == two else name
    return None


def _pieces(path: Path) -> Any:
    """What a tokenizer's file says of its pieces and their ids."""
    if path.suffix != ".json":
        return path.read_bytes()
    model = read_json(path, most=MAX_BYTES).get("model")
    return model.get("vocab") if isinstance(model, dict) else None


def _facts(branch: CheckpointSource) -> dict[str, Any]:
    """What branches must agree in, by field."""
    config = branch.config
    told = _meaning(config) if isinstance(config, DecoderConfig) else config.to_dict()
    return {"model_type": told.get("model_type"), "task": branch.task, **told}


def _meaning(config: DecoderConfig) -> dict[str, Any]:
    """What decides what a decoder computes, whether a hub's old file or a new training says it."""
    kind, told = config.dense_kind, dict(config.comparable())
    told |= {"intermediate_size": config.d_ff, "rope_parameters": dict(told["rope_parameters"])}
    if told["rope_parameters"].get("partial_rotary_factor") == 1.0:
        del told["rope_parameters"]["partial_rotary_factor"]
    gone = {*_FREE, *kind.only, *kind.older.values()}
    if told["rope_parameters"]["rope_type"] == "default":
        gone.add("max_position_embeddings")  # which then bounds texts alone
    if "layer_types" in told:
        told["layer_types"] = [_NEW.get(name, name) for name in told["layer_types"]]
        gone |= {"sliding_window_pattern", "_sliding_window_pattern", "layers_block_type"}
        if "sliding_attention" not in told["layer_types"]:
            gone |= {"sliding_window", "use_sliding_window", "max_window_layers"}
    return {name: value for name, value in told.items() if name not in gone}


def _outputs(
    plan: Plan, branches: Sequence[CheckpointSource], inputs: LayerInputs
) -> Iterator[Output]:
    for layer, router in plan.routers.items():
        yield Output(router, make=partial(router_bytes, plan, layer, router, inputs.get(layer)))
        for constant in plan.constants.get(layer, ()):
            yield Output(constant, make=partial(plan.constant, constant))
    for move in plan.moves:
        if move.layer is None:
            for target in move.targets:
                yield Output(target, make=partial(_average, move, branches, 1.0))
            continue
        if move.shared is not None:
            yield Output(move.shared, make=partial(_average, move, branches, move.shared_scale))
        for index, target in enumerate(move.targets):
            branch = branches[index % len(branches)]
            yield Output(target, make=partial(_expert, move, branch, target.dtype))


def _average(move: Move, branches: Sequence[CheckpointSource], scale: float) -> bytes | memoryview:
    """The mean over branches, exact for equal ones, scaled."""
    return scale_bytes(_mean(move, branches), move.targets[0].dtype, scale)


def _mean(move: Move, branches: Sequence[CheckpointSource]) -> memoryview:
    import torch

    parts = [_of(move, branch) for branch in branches]
    mean = parts[0]
    if not all(torch.equal(part, mean) for part in parts[1:]):
        mean = torch.stack([part.double() for part in parts]).mean(0)
    return tensor_bytes(cast(mean, move.targets[0].dtype, move.source.name))


def _expert(move: Move, branch: CheckpointSource, dtype: str) -> bytes | memoryview:
    content = tensor_bytes(cast(_of(move, branch), dtype, move.source.name))
    return scale_bytes(content, dtype, move.scale)


def _of(move: Move, branch: CheckpointSource) -> Tensor:
    info = branch.tensors[move.parameter][0]
    tensor = branch.source.tensor(info.name)
    check_finite(tensor_bytes(tensor), info.dtype, info.name, branch.path)
    return tensor
