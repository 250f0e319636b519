"""Initial weights: T5's scheme for dense models, the paper's smaller one for sparse models."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moezoo.config import SwitchConfig
from moezoo.experts.base import Experts
from moezoo.experts.feed_forward import FeedForward
from moezoo.functional.truncated_normal import truncated_normal_
from moezoo.models.attention import Attention
from moezoo.models.feed_forward import DenseMLP
from moezoo.models.norm import RMSNorm
from moezoo.models.position import PositionBias
from moezoo.routers.base import Router
from moezoo.routers.switch import ROUTER_INIT_STD

SWITCH_SCALE = 0.1


@torch.no_grad()
def initialize(model: nn.Module, config: SwitchConfig) -> None:
    """Draw every weight of a model.

    Dense: N(0, f^2) embeddings, N(0, f^2 / fan-in) projections, queries smaller by sqrt(d_kv), as
    Mesh TensorFlow's T5 does. Sparse: truncated normals of variance 0.1 / fan-in (Switch
    Transformers, section 2.4: 0.1x is what makes large sparse models train). f is
    `initializer_factor`; routers are N(0, 0.02).
    """
    for module in model.modules():
        _initialize_module(module, config)
    head = getattr(model, "lm_head", None)
    if isinstance(head, nn.Linear):
        _draw(head.weight, config.initializer_factor * config.d_model**-0.5, config)


def _initialize_module(module: nn.Module, config: SwitchConfig) -> None:
    factor, width = config.initializer_factor, config.d_model
    if isinstance(module, RMSNorm):
        nn.init.constant_(module.weight, factor)
    elif isinstance(module, PositionBias):
        nn.init.normal_(module.weight, std=factor * width**-0.5)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=factor)
    elif isinstance(module, Attention):
        inner = config.num_heads * config.d_kv
        _draw(module.q.weight, factor * (width * config.d_kv) ** -0.5, config)
        _draw(module.k.weight, factor * width**-0.5, config)
        _draw(module.v.weight, factor * width**-0.5, config)
        _draw(module.o.weight, factor * inner**-0.5, config)
    elif isinstance(module, (DenseMLP, FeedForward)):
        for weight in module.parameters():
            _draw(weight, factor * weight.shape[-1] ** -0.5, config)
    elif isinstance(module, Router):
        for parameter in module.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=ROUTER_INIT_STD)
    elif isinstance(module, Experts):
        _initialize_experts(module, config)


def _initialize_experts(module: Experts, config: SwitchConfig) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() == 3 and name.startswith("w"):
            _draw(parameter, config.initializer_factor * parameter.shape[-1] ** -0.5, config)


def _draw(weight: Tensor, std: float, config: SwitchConfig) -> None:
    if config.num_experts == 0:
        nn.init.normal_(weight, std=std)
        return
    truncated_normal_(weight, std=std * SWITCH_SCALE**0.5)
