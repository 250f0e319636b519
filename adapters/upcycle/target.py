"""What a recipe leaves open, and the config of an upcycled T5."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection
from typing import Any

from moezoo.adapters.families import ModelConfig, expressible
from moezoo.adapters.upcycle.inits import ExpertInit, expert_inits
from moezoo.adapters.upcycle.placement import placed
from moezoo.adapters.upcycle.preservation import (
    choices_of,
    preserving_scale,
    router_for,
    weighs_alike,
)
from moezoo.adapters.upcycle.recipe import Recipe
from moezoo.config import SwitchConfig
from moezoo.registry import Spec

# What transformers' Switch can hold: the winning probability as the weight, from rows so small that
# it is 1/E.
BY_PROBABILITY = "switch"
# What learns most at equal FLOPs (benchmarks/evidence.md): a weight of 1, so that the function does
# not hang on the router, from rows large enough that a step does not turn all choices over.
BY_CHOICE = {"name": "switch", "weight": "unit"}
TINY, WIDE, SHARP = "normal", "normal:0.02", "normal:0.5"
_PROBABILITY = (
    "weighed by its probability, as transformers' Switch is; experts part more slowly than with a "
    "weight of 1"
)


def settled(
    recipe: Recipe,
    source: ModelConfig,
    task: str,
    *,
    dtypes: Collection[str] = (),
    layout: str = "auto",
) -> Recipe:
    """The recipe with a router and its initialisation, where it leaves them open.

    The router of a T5 is `BY_PROBABILITY` where the Hugging Face layout is to hold the model and
    can, else `BY_CHOICE`; the siblings of decoders have one router. Rows are `WIDE` where the sum
    of a token's weights does not depend on them, `SHARP` where the chosen experts share a row, and
    else as small as exactness needs.
    """
    init, count = expert_inits.build(recipe.init), recipe.num_experts
    if recipe.router is None and isinstance(source, SwitchConfig):
        plain = router_for(init, BY_PROBABILITY, count)
        held, _ = expressible(target_config(source, recipe, init, plain, task), dtypes)
        ours = layout == "moezoo" or (held is None and layout == "auto")
        router: Any = BY_CHOICE if ours and plain.name == "switch" else BY_PROBABILITY
        recipe = dataclasses.replace(recipe, router=router)
    if recipe.router_init is None:
        rows = _rows(init, router_for(init, recipe.router or "top_k", count), count)
        recipe = dataclasses.replace(recipe, router_init=rows)
    return recipe


def _rows(init: ExpertInit, router: Spec, num_experts: int) -> str:
    if init.sums_slices:
        alike = set(Counter(init.router_rows(num_experts)).values())
        return SHARP if alike == {choices_of(router)} else TINY
    return WIDE if weighs_alike(router) else TINY


def choice_words(recipe: Recipe, config: SwitchConfig) -> str:
    """Which of the two routers was taken, what it gives up, and the flag for the other one; "" for
    a router of another kind.
    """
    if recipe.router == BY_PROBABILITY and recipe.router_init == TINY:
        held = "--layout moezoo" if expressible(config)[0] else "leave --router out"
        return f"{_PROBABILITY} ({held})"
    if Spec.parse(recipe.router, kind="router") == Spec.parse(BY_CHOICE, kind="router"):
        back = ", or `export --fold` after training" if _folds(config) else ""
        return (
            "a weight of 1, with which experts learn most (train with --recipe upcycle); not what "
            f"transformers' Switch computes (--router switch{back})"
        )
    return ""


def trained_choice_words(config: SwitchConfig, router_rate: float) -> str:
    """The same of a model that was upcycled and is trained now, its router at a factor on the rate;
    "" for one that no conversion has made, and for a router of another kind.
    """
    router = Spec.parse(config.router, kind="router")
    if config.wo_scale is None or not config.num_experts or router.name != "switch":
        return ""
    if router.options.get("weight") != "unit":
        other = "upcycle with --layout moezoo" if expressible(config)[0] else "without --router"
        return f"{_PROBABILITY} ({other})"
    slow = "; --router-learning-rate 0.01 lets them learn more" if router_rate == 1.0 else ""
    back = "`export --fold` after training, or upcycle" if _folds(config) else "upcycle"
    return (
        f"a weight of 1, with which experts learn most{slow}; not what transformers' Switch "
        f"computes ({back} with --router switch)"
    )


def _folds(config: SwitchConfig) -> bool:
    """Whether transformers' layout holds the model once its router is folded."""
    return expressible(config.replace(router=BY_PROBABILITY))[0] is not None


def target_config(
    source: SwitchConfig, recipe: Recipe, init: ExpertInit, router: Spec, task: str
) -> SwitchConfig:
    """The config of the upcycled model.

    Raises ConfigError where no factor on `wo` keeps the function, as `preserving_scale`.
    """
    decoder_layers = 0 if task == "encoder" else source.decoder_layers
    usual = "odd" if min(source.num_layers, decoder_layers or source.num_layers) > 1 else "all"
    encoder, decoder = placed(
        recipe.layers or usual, encoder_layers=source.num_layers, decoder_layers=decoder_layers
    )
    width = init.expert_width(source.d_ff, recipe.num_experts)
    experts: dict[str, Any] = {"name": "stacked", "d_ff": width}
    converted = source.replace(
        num_experts=recipe.num_experts,
        encoder_sparse_layers=encoder,
        decoder_sparse_layers=decoder,
        router=router.to_json(),
        capacity=recipe.capacity,
        experts="stacked" if width == source.d_ff else experts,
        wo_scale=preserving_scale(init, router, recipe.num_experts, recipe.preserve),
    )
    # Nothing of it is drawn, so that its files need not say how.
    return converted.without_scale()
