"""Initial weights: T5's scheme for dense models, the paper's smaller one for sparse models."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from moezoo.component import Component, owns_tensors, redraw
from moezoo.config import SwitchConfig
from moezoo.experts import StackedExperts
from moezoo.functional.drawn import FanIn
from moezoo.functional.seeded import Seeded, keyed_seed
from moezoo.functional.shards import local_of, part_of
from moezoo.private_torch import own_parameters


@torch.no_grad()
def initialize(model: nn.Module, config: SwitchConfig) -> None:
    """Draw every weight of a model; each module's own `reset_parameters` says how.

    Dense: N(0, f^2) embeddings, N(0, f^2 / fan-in) projections, queries smaller by sqrt(d_kv), as
    Mesh TensorFlow's T5 does. Sparse: truncated normals of variance s f^2 / fan-in, where s is
    `config.sparse_variance` (Switch Transformers, section 2.4: 0.1 is what makes large sparse
    models train). f is `initializer_factor`; routers start as they do alone.
    """
    _set_scale(model, config)
    for child in model.children():
        redraw(child)


@torch.no_grad()
def initialize_parts(model: nn.Module, config: SwitchConfig, *, seed: int) -> None:
    """`initialize` for a model of which this rank holds parts: the weights depend on the seed, the
    tensor's name and the expert alone, so they are the same over any ranks, and a rank draws its
    own experts and no others. Of anything else it draws the whole, one tensor at a time.
    """
    _set_scale(model, config)
    for name, module in model.named_modules():
        if isinstance(module, StackedExperts):
            _draw_experts(module, seed, name)
        elif owns_tensors(module):
            _draw_whole(module, keyed_seed(seed, name))


def _set_scale(model: nn.Module, config: SwitchConfig) -> None:
    dense = config.num_experts == 0
    scale = config.initializer_factor * (1.0 if dense else config.sparse_variance**0.5)
    for module in model.modules():
        initial = getattr(module, "initial", None)
        if isinstance(initial, FanIn):
            module.initial = replace(initial, scale=scale, truncated=not dense)  # type: ignore[assignment]


def _draw_experts(module: StackedExperts, seed: int, name: str) -> None:
    """One expert after the other."""
    for matrix, stack in own_parameters(module).items():
        assert stack is not None
        part, held = part_of(stack), local_of(stack)
        for place in range(part.sizes[0]):
            expert = part.offsets[0] + place
            whole = torch.empty((1, *stack.shape[1:]), dtype=held.dtype, device=held.device)
            with Seeded(keyed_seed(seed, f"{name}.{matrix}", expert)):
                whole.zero_() if matrix.endswith("_bias") else module.initial(whole)
            held[place].copy_(part.inner.taken(whole[0]))


def _draw_whole(module: nn.Module, seed: int) -> None:
    """By the module's own method, on whole tensors in the places of its parts."""
    parameters = own_parameters(module)
    held = {name: parameter for name, parameter in parameters.items() if parameter is not None}
    for name, parameter in held.items():
        like = local_of(parameter)
        whole = torch.empty(parameter.shape, dtype=like.dtype, device=like.device)
        parameters[name] = nn.Parameter(whole)
    try:
        with Seeded(seed):
            module.reset_own() if isinstance(module, Component) else redraw(module)
        for name, parameter in held.items():
            drawn = parameters[name]
            assert drawn is not None
            local_of(parameter).copy_(part_of(parameter).taken(drawn))
    finally:
        parameters.update(held)
