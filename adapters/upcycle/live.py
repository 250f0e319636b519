"""Upcycling a model in memory, and taking it back, by the streaming conversion's arithmetic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moezoo.adapters.upcycle.calibration import Calibration, LayerSample, collected_inputs
from moezoo.adapters.upcycle.downcycling import applied_scale
from moezoo.adapters.upcycle.drawing import cast
from moezoo.adapters.upcycle.inits import expert_inits, router_inits
from moezoo.adapters.upcycle.preservation import router_for
from moezoo.adapters.upcycle.recipe import DTYPES, Recipe
from moezoo.adapters.upcycle.scaling import out_of_range
from moezoo.adapters.upcycle.target import settled, target_config
from moezoo.building import TASKS, build
from moezoo.config import SwitchConfig
from moezoo.errors import ConfigError, TensorMismatch
from moezoo.functional.shards import refuse_sharded
from moezoo.models import SwitchForConditionalGeneration


@torch.no_grad()
def upcycle_model(
    model: nn.Module,
    recipe: Recipe,
    *,
    calibration: Calibration | None = None,
    drop_heads: bool = False,
) -> nn.Module:
    """A new sparse model from a live dense one, which is left as it was.

    Args:
        model: a moezoo model without sparse layers, or a transformers T5.
        recipe: see `Recipe`.
        calibration: sample ids, for router initialisations that need them.
        drop_heads: leave out a transformers model's head that moezoo's models do not have.

    Raises ConfigError for a model that is sparse already or not of the family.
    """
    refuse_sharded(model, "upcycling")
    model = as_moezoo(model, drop_heads=drop_heads)
    source, task = model_config(model), model_task(model)
    if source.encoder_sparse or source.decoder_sparse:
        hint = "Use `moezoo grow` for more experts."
        raise ConfigError("the model is a mixture of experts already", field="model", hint=hint)
    init = expert_inits.build(recipe.init)
    init.check(source.d_ff, recipe.num_experts)
    recipe = settled(recipe, source, task, dtypes=_dtypes(model, recipe))
    router = router_for(init, recipe.router, recipe.num_experts)
    config = target_config(source, recipe, init, router, task)
    layers = sparse_mlps(config)
    dense = model.state_dict()
    sparse = build(config, task=task, device="meta")
    state: dict[str, Tensor] = {
        name: dense[name].clone() for name in sparse.state_dict() if name in dense
    }
    inputs = _inputs(model, recipe, calibration, layers)
    for layer in layers:
        state.update(_layer(dense, layer, recipe, applied_scale(config), inputs.get(layer)))
    if recipe.dtype is not None:
        state = {
            name: cast(tensor, DTYPES[recipe.dtype], name) if tensor.is_floating_point() else tensor
            for name, tensor in state.items()
        }
    _load(sparse, state)
    return _as_before(sparse, model)


def downcycle_model(model: nn.Module, *, scale: float | None = None) -> nn.Module:
    """The dense model whose copies the experts are; byte-identical where upcycling was exact.

    Args:
        model: a moezoo Switch model whose experts are equal within each layer.
        scale: the factor on `wo` to undo; None: the config's, and without one what
            `preserve="exact"` gives the router.

    Raises TensorMismatch naming the layer whose experts differ (merge them first), ConfigError for
    a model without sparse layers.
    """
    refuse_sharded(model, "downcycling")
    config, task = model_config(model), model_task(model)
    layers = sparse_mlps(config)
    if not layers:
        raise ConfigError("the model is dense already", field="model")
    scale = applied_scale(config) if scale is None else scale
    target = config.replace(
        num_experts=0, experts="stacked", router="switch", capacity=None, wo_scale=None
    )
    dense = build(target, task=task, device="meta")
    state = model.state_dict()
    made = {name: state[name].clone() for name in dense.state_dict() if name in state}
    for layer in layers:
        start = f"{layer}.experts."
        for name in [n for n in state if n.startswith(start)]:
            matrix, experts = name.removeprefix(start), state[name]
            if bool((experts != experts[:1]).any()):
                hint = "Merge the experts first (`moezoo shrink`)."
                reason = f"the experts of {layer} differ in {matrix}"
                raise TensorMismatch(reason, key=name, hint=hint)
            undo = scale if matrix == "wo" else 1.0
            made[f"{layer}.{matrix}.weight"] = experts[0] / undo
    _load(dense, made)
    return _as_before(dense, model)


def sparse_mlps(config: SwitchConfig) -> list[str]:
    """Module names of the sparse MLPs of a model."""
    stacks = (("encoder", config.encoder_sparse), ("decoder", config.decoder_sparse))
    return [f"{stack}.blocks.{i}.mlp" for stack, indices in stacks for i in indices]


def model_config(model: nn.Module) -> SwitchConfig:
    """The config of a moezoo model. Raises ConfigError for any other module."""
    config = getattr(model, "config", None)
    if not isinstance(config, SwitchConfig):
        found = type(model).__name__
        hint = "Replace MLPs of other models with moezoo.plug."
        raise ConfigError("not a T5 or Switch model", field="model", found=found, hint=hint)
    return config


def model_task(model: nn.Module) -> str:
    """The task that `moezoo.build` calls a model's class."""
    return next(
        name for name, kind in TASKS.items() if isinstance(model, kind) and type(model) is kind
    )


def as_moezoo(model: nn.Module, *, drop_heads: bool = False) -> nn.Module:
    """The model itself, or a moezoo twin of a transformers model."""
    if type(model).__module__.startswith("transformers."):
        from moezoo.adapters.transformers import from_transformers

        return from_transformers(model, drop_heads=drop_heads)
    return model


def _layer(
    dense: dict[str, Tensor], layer: str, recipe: Recipe, scale: float, sample: LayerSample | None
) -> dict[str, Tensor]:
    """Router and stacked experts of one layer, by parameter name."""
    start = f"{layer}."
    matrices = {
        name.removeprefix(start).removesuffix(".weight"): tensor
        for name, tensor in dense.items()
        if name.startswith(start)
    }
    init, count = expert_inits.build(recipe.init), recipe.num_experts
    made = [init.expert([matrices], e, count, key=layer, seed=recipe.seed) for e in range(count)]
    state: dict[str, Tensor] = {}
    for matrix in matrices:
        stack = torch.stack([expert[matrix] for expert in made])
        state[f"{layer}.experts.{matrix}"] = scaled(stack, scale) if matrix == "wo" else stack
    width = matrices["wo"].shape[0]
    drawn = router_inits.build(recipe.router_init).rows(
        count,
        width,
        key=layer,
        seed=recipe.seed,
        inputs=None if sample is None else sample.inputs,
        experts=None if sample is None else sample.experts,
    )
    like = matrices["wo"]
    rows = torch.tensor(drawn, dtype=torch.float32, device="cpu").view(count, width)[
        init.router_rows(count)
    ]
    state[f"{layer}.router.classifier.weight"] = rows.to(like.device, like.dtype)
    return state


def _dtypes(model: nn.Module, recipe: Recipe) -> set[str]:
    """What the weights of the upcycled model will be, as checkpoints call it."""
    if recipe.dtype is not None:
        return {DTYPES[recipe.dtype]}
    words = {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}
    return {DTYPES[word] for word in words & DTYPES.keys()}


def scaled(stack: Tensor, factor: float) -> Tensor:
    """`stack` times `factor`. Raises NonFiniteWeights where a weight leaves the dtype's range."""
    product = stack * factor
    if bool((product.isinf() & stack.isfinite()).any()):
        raise out_of_range(str(stack.dtype).removeprefix("torch."), factor)
    return product


def _inputs(
    model: nn.Module, recipe: Recipe, calibration: Calibration | None, layers: list[str]
) -> dict[str, LayerSample]:
    if not router_inits.build(recipe.router_init).needs_inputs:
        return {}
    if calibration is None:
        hint = "Pass calibration=Calibration(sequences), or use router_init='normal'."
        reason = "this router initialisation needs sample text"
        raise ConfigError(reason, field="calibration", hint=hint)
    return collected_inputs(model, calibration, layers)


def _as_before(made: nn.Module, model: nn.Module) -> nn.Module:
    """A converted model in the mode of its source, with what that says about generating."""
    if isinstance(made, SwitchForConditionalGeneration):
        made.generation = model.generation  # type: ignore[assignment]
    return made.train(model.training)


def _load(model: nn.Module, state: dict[str, Any]) -> None:
    """Give a model on "meta" its tensors, as trainable parameters."""
    missing = [name for name in model.state_dict() if name not in state]
    if missing:
        hint = "Use the routers 'switch' or 'top_k', which the classifier alone describes."
        raise ConfigError(f"no initial value for {missing[0]!r}", field="router", hint=hint)
    model.load_state_dict(state, strict=True, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
