"""Random-weight transformers models and their weights under our names, without the adapters."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

import moezoo

SIZES = {"vocab_size": 97, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_heads": 3, "num_layers": 3}
_RULES = [
    (r"\.block\.", ".blocks."),
    (r"\.layer\.0\.SelfAttention\.relative_attention_bias\.", ".attention.position_bias."),
    (r"\.layer\.0\.SelfAttention\.", ".attention."),
    (r"\.layer\.0\.layer_norm\.", ".attention_norm."),
    (r"\.layer\.1\.EncDecAttention\.", ".cross_attention."),
    (r"decoder(.*)\.layer\.1\.layer_norm\.", r"decoder\1.cross_norm."),
    (r"\.layer\.[12]\.layer_norm\.", ".mlp_norm."),
    (r"\.layer\.[12]\.(DenseReluDense|mlp)\.", ".mlp."),
    (r"\.final_layer_norm\.", ".final_norm."),
]


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy a transformers model's weights into a moezoo model; every name must be used."""
    stacked: dict[str, dict[int, Tensor]] = {}
    state: dict[str, Tensor] = {}
    for name, tensor in source.state_dict().items():
        if name.endswith("embed_tokens.weight"):
            continue
        for pattern, replacement in _RULES:
            name = re.sub(pattern, replacement, name)
        expert = re.match(r"(.*\.experts)\.expert_(\d+)\.(wi|wo)\.weight", name)
        if expert:
            key = f"{expert[1]}.{expert[3]}"
            stacked.setdefault(key, {})[int(expert[2])] = tensor
        else:
            state[name] = tensor
    for key, experts in stacked.items():
        state[key] = torch.stack([experts[e] for e in range(len(experts))])
    if getattr(target, "lm_head", None) is None:
        state.pop("lm_head.weight", None)
    target.load_state_dict(state, strict=True)


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Weights of a size at which logits are of order one and biases matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * (0.3 if parameter.dim() > 1 else 0.1))
            if parameter.dim() == 1:
                parameter.add_(1.0)


def moezoo_model(task: str = "conditional_generation", **overrides: object) -> nn.Module:
    """A tiny moezoo model of the same sizes."""
    config = moezoo.SwitchConfig(**SIZES).replace(dropout_rate=0.0, **overrides)
    return moezoo.build(config, task=task)
