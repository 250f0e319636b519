"""The levels of verification that run a decoder: layers, logits, routers.

The third and the fifth need torch alone; the fourth asks transformers, whose model it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moezoo.adapters.checkpoint_source import CheckpointSource
from moezoo.adapters.families import DecoderConfig
from moezoo.adapters.families.decoders import family_for
from moezoo.adapters.plan import Plan
from moezoo.adapters.upcycle.keyed import keyed_generator
from moezoo.adapters.verification import LevelResult
from moezoo.adapters.verify_function import disturb, fill, judged, random_ids, relative, spread
from moezoo.assemble import make_moe
from moezoo.config import SwitchConfig
from moezoo.errors import CheckpointError, ConfigError, how_to_install
from moezoo.layer import MoE
from moezoo.models.feed_forward import DenseMLP

_TOKENS = 64


@torch.no_grad()
def layers_agree(plan: Plan, source: CheckpointSource, made: CheckpointSource) -> LevelResult:
    """Level 3: every sparse layer on its own, one at a time, against the dense one, in float32."""
    errors: dict[str, float] = {}
    for layer in plan.routers:
        dense = _dense(plan.source_config, source, layer)
        x = _tokens(plan, layer)
        expected, found = dense(x), _sparse(plan, made, layer)(x)[0]
        if _config(plan).shares:
            found = found + _shared(plan, made, layer, x)
        errors[layer] = relative(found, expected)
    worst = max(errors, key=lambda layer: errors[layer])
    return judged(3, plan, made, errors[worst], f"layers within {errors[worst]:.1e}", errors)


@torch.no_grad()
def logits_agree(plan: Plan, source: CheckpointSource, made: CheckpointSource) -> LevelResult:
    """Level 4: the whole models on random ids, as transformers loads and runs them, in float32; a
    tensor that it misses or does not expect is a failure.
    """
    ids = random_ids(plan)
    words = {"purpose": "the fourth level of a decoder", "without": "--levels 1,2,3,5"}
    dense, _ = load_transformers(source, **words)
    expected = dense(ids).logits
    disturb(dense, plan, made, _down)
    sensitivity = relative(dense(ids).logits, expected)
    del dense
    model, strange = load_transformers(made, **words)
    error = relative(model(ids).logits[..., : expected.shape[-1]], expected)
    if strange:
        facts = {"error": error, "details": {"strange": strange[:20]}}
        return LevelResult(4, False, f"transformers does not know {strange[0]}", facts)
    summary = f"logits within {error:.1e} in transformers, no tensor missing or unexpected"
    return judged(4, plan, made, error, summary, {}, least=2.0 * sensitivity)


@torch.no_grad()
def routers_are_healthy(
    plan: Plan, source: CheckpointSource, made: CheckpointSource
) -> LevelResult:
    """Level 5: how evenly random tokens spread over the experts of each layer; a report, with no
    bar to pass except that probabilities are finite.
    """
    return spread(
        plan, {layer: _sparse(plan, made, layer)(_tokens(plan, layer))[1] for layer in plan.routers}
    )


Check = Callable[[Plan, CheckpointSource, CheckpointSource], LevelResult]
CHECKS: dict[int, Check] = {3: layers_agree, 4: logits_agree, 5: routers_are_healthy}


def load_transformers(
    checkpoint: CheckpointSource, *, purpose: str, without: str, device: str = "cpu"
) -> tuple[nn.Module, list[str]]:
    """The model as transformers loads it, in float32, and the names of tensors that it missed, did
    not expect or found in another shape.

    Args:
        purpose, without: what it is for, and what does without it; for the ConfigError that is
            raised where transformers is not installed, and the CheckpointError where it fails.
    """
    try:
        import transformers
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        raise ConfigError(
            f"{purpose} needs transformers, which is missing", field="transformers",
            hint=f"{how_to_install('hf')}. Without it: {without}.",
        ) from None  # fmt: skip
    # Its kernels for groups of rows refuse some sizes; the weights are what is looked at.
    plain = {"experts_implementation": "eager"} if checkpoint.config.decoder_sparse else {}
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            str(checkpoint.path), dtype=torch.float32, output_loading_info=True,
            local_files_only=True, **plain,
        )  # fmt: skip
    except Exception as error:  # of any of its parts: an unknown class, a field of another kind
        told = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot load it ({told[:160]})",
            path=checkpoint.path, hint=f"Try a newer transformers. Without it: {without}.",
        ) from error  # fmt: skip
    finally:
        if shown:
            logging.enable_progress_bar()
    names = [str(name) for found in report.values() for name in found]
    return model.to(device).eval(), names


def _config(plan: Plan) -> DecoderConfig:
    assert isinstance(plan.config, DecoderConfig)
    return plan.config


def _dense(config: Any, checkpoint: CheckpointSource, layer: str) -> DenseMLP:
    mlp = DenseMLP(config.d_model, config.d_ff, activation_name=config.feed_forward_proj).eval()
    fill(mlp, checkpoint, layer)
    return mlp


def _sparse(plan: Plan, made: CheckpointSource, layer: str) -> MoE:
    """The layer as moezoo builds it from the same numbers."""
    config = _config(plan)
    sizes = SwitchConfig(
        vocab_size=2, d_model=config.d_model, d_ff=config.d_ff, num_layers=1,
        num_experts=config.num_experts, feed_forward_proj=config.feed_forward_proj,
        router=config.router, experts=config.experts, capacity="dropless", dropout_rate=0.0,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    moe = make_moe(sizes, decoder=True).eval()
    fill(moe, made, layer)
    return moe


def _shared(plan: Plan, made: CheckpointSource, layer: str, x: Tensor) -> Tensor:
    """What every token passes beside its experts, weighed by its gate where there is one."""
    y: Tensor = _dense(plan.source_config, made, f"{layer}.shared")(x)
    gates = made.tensors.get(f"{layer}.router.shared_gate")
    if gates is None:
        return y
    gate = made.source.tensor(gates[0].name).float()
    return torch.sigmoid(x @ gate.T) * y


def _tokens(plan: Plan, layer: str) -> Tensor:
    generator = keyed_generator(plan.recipe.seed, f"{layer}.verify")
    return torch.randn(1, _TOKENS, plan.config.d_model, generator=generator, device="cpu")


def _down(model: nn.Module, plan: Plan, layer: str) -> nn.Parameter:
    """The parameter of transformers' dense model that is a layer's `wo`."""
    config = plan.source_config
    assert isinstance(config, DecoderConfig)
    (name,) = family_for(config).disk_names(f"{layer}.wo.weight")
    return model.get_parameter(name)
