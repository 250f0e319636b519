"""The sparse sibling of a dense decoder: its config.json, or why there is none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from moezoo.adapters.families.decoder_config import PLUG, DecoderConfig
from moezoo.adapters.families.decoders import own_values
from moezoo.adapters.families.dense_kind import DenseKind
from moezoo.adapters.families.sparse_decoders import ALIASES, SPARSE, SparseKind
from moezoo.adapters.upcycle.inits import ExpertInit
from moezoo.adapters.upcycle.placement import Layers, placed
from moezoo.adapters.upcycle.preservation import router_for
from moezoo.adapters.upcycle.recipe import Recipe
from moezoo.errors import ConfigError
from moezoo.frozen import frozen, thawed
from moezoo.registry import Spec


def sparse_sibling(
    source: DecoderConfig, recipe: Recipe, init: ExpertInit
) -> tuple[DecoderConfig, float]:
    """The config of the upcycled model, and the factor on a shared expert's `wo`.

    Raises ConfigError naming the field that the sibling has no word for, or the part of the recipe
    that it cannot follow.
    """
    dense, sparse = source.dense_kind, SPARSE[source.dense_kind.sibling]
    layers = _layers(source, recipe, sparse)
    choices = _choices(recipe, init, sparse)
    _refuse_capacity(recipe, sparse)
    width = init.expert_width(source.d_ff, recipe.num_experts)
    if width != source.d_ff and sparse.shared_width == sparse.width:
        raise ConfigError(
            f"{sparse.model_type} has one width for experts and for what all tokens pass",
            field="init", found=str(recipe.init), hint="Use init='copy'.",
        )  # fmt: skip
    values = {
        **_carried(source, dense, sparse),
        **sparse.sets,
        **({"routed_scaling_factor": 1.0 + 2 * sparse.added / choices} if sparse.added else {}),
        **dense.says(source.full),
        **{name: source.d_ff for name in (sparse.dense_width, sparse.shared_width) if name},
        sparse.width: width,
        sparse.experts[0]: recipe.num_experts,
        sparse.choices: choices,
        **layers,
        "model_type": sparse.model_type,
        "architectures": [sparse.architecture],
    }
    scale = sparse.routed * (choices if init.sums_slices else 1.0)
    exact = recipe.preserve == "exact"
    config = DecoderConfig(frozen(values), scale if exact else 1.0, source.values)
    return config, sparse.shared_scale if exact else 1.0


def dense_sibling(config: DecoderConfig) -> DecoderConfig:
    """The config of the dense model inside a sparse one: what it was made from, or its like."""
    if config.dense_values is not None:
        values = thawed(config.dense_values)
        return DecoderConfig(frozen({**values, "vocab_size": config.vocab_size}))
    sparse = config.sparse_kind
    assert sparse is not None
    dense = config.dense_kind
    gone = {*sparse.sets, *sparse.experts, sparse.choices, sparse.width, sparse.dense_width}
    gone |= {sparse.shared_width, *_PLACES}
    values = {name: value for name, value in own_values(config).items() if name not in gone}
    named = {"model_type": dense.model_type, "architectures": [dense.architecture]}
    whole = {dense.stated: config.d_ff}
    return DecoderConfig(frozen({**values, **dense.only, **dense.plain, **whole, **named}))


_PLACES = (
    "decoder_sparse_step",
    "mlp_only_layers",
    "moe_layer_start_index",
    "moe_layer_end_index",
    "moe_layer_interval",
    "mlp_layer_types",
    "first_k_dense_replace",
    "num_dense_layers",
)


def _layers(source: DecoderConfig, recipe: Recipe, sparse: SparseKind) -> dict[str, Any]:
    """The fields that place the experts."""
    wanted = "all" if recipe.layers is None else recipe.layers
    if not isinstance(wanted, Mapping) and "=" not in wanted:
        wanted = {"decoder": wanted}
    if any(str(part).strip().startswith("enc") for part in _stacks(wanted)):
        raise ConfigError(
            "a decoder has no encoder", field="layers", found=str(recipe.layers),
            hint="Name its layers alone, such as '0,2' or 'all'.",
        )  # fmt: skip
    _, layers = placed(wanted, encoder_layers=0, decoder_layers=source.num_layers)
    fields = sparse.placement.write(layers, source.num_layers)
    if fields is None:
        raise ConfigError(
            f"{sparse.model_type} has experts in {sparse.placement.words}", field="layers",
            found=str(recipe.layers), hint=f"Use layers='all'. {PLUG}",
        )  # fmt: skip
    return fields


def _stacks(layers: Layers) -> Iterable[object]:
    return layers.split(";") if isinstance(layers, str) else layers


def _choices(recipe: Recipe, init: ExpertInit, sparse: SparseKind) -> int:
    """Experts per token. Raises ConfigError for a router that these models do not have."""
    count = recipe.num_experts
    sparse.check_number(count)
    wanted = {"name": "top_k"} if recipe.router is None else recipe.router
    spec = router_for(init, wanted, count)
    k = spec.options.get("k", min(2, count))
    if spec.name != "top_k" or set(spec.options) - {"k"}:
        raise ConfigError(
            "these models normalise the weights of their k best experts, and nothing else",
            field="router", expected="top_k, with a number k", found=str(spec.to_json())[:80],
            hint=PLUG,
        )  # fmt: skip
    router_for(init, Spec("top_k", {"k": k}), count)
    return int(k)


def _refuse_capacity(recipe: Recipe, sparse: SparseKind) -> None:
    if recipe.capacity not in (None, "dropless"):
        raise ConfigError(
            f"{sparse.model_type} drops no tokens", field="capacity", expected="dropless",
            found=str(recipe.capacity)[:80], hint=PLUG,
        )  # fmt: skip


def _carried(source: DecoderConfig, dense: DenseKind, sparse: SparseKind) -> dict[str, Any]:
    """What both models mean by the same field, spelled out where the dense one's was silent."""
    values = own_values(source)
    for name in (*dense.only, *dense.ignored, *ALIASES):
        values.pop(name, None)
    if values.get("sliding_window", 0) is None and values.get("use_sliding_window"):
        values["use_sliding_window"] = False  # else the sibling draws the mask of a window
    return values if dense.windows == "each" else _one_window(values, dense, sparse)


def _one_window(values: dict[str, Any], dense: DenseKind, sparse: SparseKind) -> dict[str, Any]:
    """The fields for a sibling whose layers all attend alike."""
    kinds = set(values.pop("layer_types"))
    windowed = "sliding_attention" in kinds
    if len(kinds) > 1 or (windowed and dense.windows == "none"):
        has = "the same attention in all layers" if dense.windows == "one" else "no sliding windows"
        raise ConfigError(
            f"{sparse.model_type} has {has}", field="layer_types",
            found=", ".join(sorted(kinds)), hint=PLUG,
        )  # fmt: skip
    values.pop("max_window_layers", None)
    values.pop("sliding_window_pattern", None)
    if dense.windows == "none":
        values.pop("sliding_window", None)
    else:
        values["use_sliding_window"] = windowed
    rope = values.get("rope_parameters")
    if isinstance(rope, Mapping) and (kinds & set(rope)):
        values["rope_parameters"] = rope[next(iter(kinds))]
    return values
