"""The experts of transformers' sparse models, computed by moezoo: `experts_implementation`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moezoo.errors import ConfigError
from moezoo.functional.gated_units import SiluGate
from moezoo.functional.routed_mlp import Networks, Rows, routed_mlp
from moezoo.ops.observed import is_observed
from moezoo.private_torch import own_parameters

NAME = "moezoo"
_SHIPPED = ("transformers.", "torch.nn.modules.activation")
_HOME, _SILU = "transformers.integrations.moe", ("SiLUActivation", "SiLU")
_FUNCTIONS = (F.silu, F.relu, F.gelu)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MATRICES = ("gate_up_proj", "up_proj", "down_proj")
_PROJECTIONS = frozenset((*_MATRICES, *(f"{name}_bias" for name in _MATRICES)))


def register_experts() -> None:
    """Make "moezoo" one of the values that `experts_implementation` takes in transformers, next to
    "eager", "grouped_mm" and "batched_mm"; may be called again.
    """
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def experts_forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What a class with transformers' `@use_experts_implementation` computes, by its own flags.

    Args:
        module: its parameters and `_apply_gate` or `act_fn` are followed, wrapped or not.
        hidden_states: (T, D). top_k_index: (T, K); numbers from `num_experts` on are the experts of
            other devices. top_k_weights: (T, K).

    Returns:
        (T, D) in the dtype of hidden_states.

    Raises ConfigError for weights of a dtype that has to be decoded first.
    """
    name = "gate_up_proj" if module.has_gate else "up_proj"
    up, down = getattr(module, name), module.down_proj
    for field, weight in ((name, up), ("down_proj", down)):
        if weight.dtype not in _DTYPES:
            hint = "Use the experts_implementation of its quantisation, or weights without one."
            reason = f"{type(module).__name__} holds {weight.dtype}, which moezoo does not decode"
            raise ConfigError(reason, field=field, hint=hint)
    if module.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    pure = _is_pure(module)
    networks = Networks(
        up,
        down,
        _function(module, pure),
        up_bias=getattr(module, f"{name}_bias") if module.has_bias else None,
        down_bias=module.down_proj_bias if module.has_bias else None,
        # A flag of 5.2x: before it there was no such class.
        after=module.post_expert_norm if getattr(module, "has_post_expert_norm", False) else None,
        pure=pure,
    )
    return routed_mlp(hidden_states, top_k_index, top_k_weights, networks)


def _function(module: Any, pure: bool) -> Rows:
    """What comes between the projections; the usual one with its gradient by hand."""
    if not module.has_gate:
        activation: Rows = module.act_fn
        return activation
    gate: Rows = module._apply_gate
    usual = pure and gate.__module__ == _HOME and type(module.act_fn).__name__ in _SILU
    return SiluGate() if usual else gate


def _is_pure(module: Any) -> bool:
    """Whether what comes between the projections may be called again in backward: a gate and an
    activation that transformers or torch ship, without parameters, randomness and onlookers.
    """
    if torch.compiler.is_compiling():
        return False
    own = vars(module)
    gate = own.get("_apply_gate") or getattr(type(module), "_apply_gate", None)
    if not getattr(gate, "__module__", "").startswith(_SHIPPED):
        return False
    if not own_parameters(module).keys() <= _PROJECTIONS:
        return False
    if "act_fn" in own and own["act_fn"] not in _FUNCTIONS:
        return False
    parts = (part for name, part in module.named_children() if name != "parametrizations")
    return all(_is_plain(part) for whole in parts for part in whole.modules())


def _is_plain(part: nn.Module) -> bool:
    if not type(part).__module__.startswith(_SHIPPED) or isinstance(part, nn.RReLU):
        return False
    return not own_parameters(part) and not is_observed(part)
