"""What a config costs: parameters, FLOPs and bytes, by arithmetic for plain models, by asking a
sparse layer without memory for others. Imports no torch for a plain one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moezoo.config import SwitchConfig
from moezoo.registry import Spec

BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
# What these do is known without torch (a test asks them): the option that holds the choices.
_PLAIN_ROUTERS = {"switch": (None, 1), "top_k": ("k", 2)}
_PLAIN_EXPERTS = frozenset(("d_ff", "dropout"))


@dataclass(frozen=True)
class Cost:
    """Sizes of a model.

    parameters: all. active: those that one token of encoder and decoder uses, each embedding table
    counted once; of experts of several sizes the largest. flops_per_token: of one forward pass
    through both stacks, two per multiplication, attention scores at `length` tokens included.
    expert_parameters: within containers, router_parameters: within routers, of all layers.
    bounds_load: the router itself bounds how many tokens an expert takes.
    """

    parameters: int
    active: int
    expert_parameters: int
    router_parameters: int
    flops_per_token: int
    bounds_load: bool

    def bytes(self, dtype: str) -> int:
        """Bytes of the weights in a dtype of `BYTES`."""
        return self.parameters * BYTES[dtype]


@dataclass(frozen=True)
class LayerCost:
    """One sparse layer: parameters of router, shared branch, container as a whole (`common`) and of
    each expert, `choices` experts per token and `rows` that they compute for it on average.

    stacks: the shapes of experts that can be divided among ranks. dense: those of every other
    parameter. scores: numbers that the router keeps per token and expert.
    """

    router: int
    branch: int
    common: int
    experts: tuple[int, ...]
    choices: int
    rows: float
    bounds_load: bool = False
    stacks: tuple[tuple[int, ...], ...] = ()
    dense: tuple[tuple[int, ...], ...] = ()
    scores: int = 2

    @property
    def active(self) -> int:
        """Parameters that a token meets."""
        largest = sorted(self.experts, reverse=True)[: self.choices]
        return self.router + self.branch + self.common + sum(largest)

    @property
    def matrices(self) -> float:
        """Multiplications per token."""
        mean = sum(self.experts) / max(len(self.experts), 1)
        return self.router + self.branch + self.rows * (self.common + mean)


def cost(config: SwitchConfig, *, task: str = "conditional_generation", length: int = 512) -> Cost:
    """The cost of a model.

    Args:
        task: "conditional_generation", "model" (no head) or "encoder", as `build` takes it.
        length: tokens per sequence, for attention and routers that mix them.

    Raises ConfigError for components that cannot be built.
    """
    decoders = 0 if task == "encoder" else config.decoder_layers
    has_head = task == "conditional_generation"
    inner = config.num_heads * config.d_kv
    attention = 4 * config.d_model * inner
    mlp = _network(config, config.d_ff)
    sparse = len(config.encoder_sparse) + (len(config.decoder_sparse) if decoders else 0)
    layer = layer_cost(config, length=length) if sparse else LayerCost(0, 0, 0, (), 0, 0.0)
    layers, stacks = config.num_layers + decoders, 2 if decoders else 1
    dense_matrices = config.num_layers * attention + decoders * 2 * attention
    dense_matrices += (layers - sparse) * mlp
    norms = config.d_model * (2 * config.num_layers + 3 * decoders + stacks)
    tables = layers if config.position_bias_every_layer else stacks
    biases = tables * config.relative_attention_num_buckets * config.num_heads
    embedding = config.vocab_size * config.d_model
    own_head = has_head and not config.tie_word_embeddings
    own_tables = sum(stack == "encoder" or decoders > 0 for stack in config.own_embeddings)
    tables_of_tokens = embedding * (1 + own_head + own_tables)
    dense = dense_matrices + norms + biases + tables_of_tokens
    experts = sparse * (layer.common + sum(layer.experts))
    scores = 2 * inner * length * (config.num_layers + 2 * decoders)
    matrices = dense_matrices + sparse * layer.matrices + (embedding if has_head else 0)
    return Cost(
        parameters=dense + experts + sparse * (layer.router + layer.branch),
        active=dense + sparse * layer.active,
        expert_parameters=experts,
        router_parameters=sparse * layer.router,
        flops_per_token=round(2 * (matrices + scores)),
        bounds_load=layer.bounds_load,
    )


def layer_cost(config: SwitchConfig, *, length: int = 512) -> LayerCost:
    """The cost of one sparse layer of a config. Raises ConfigError as building it would."""
    router, experts = Spec.parse(config.router), Spec.parse(config.experts)
    option, default = _PLAIN_ROUTERS.get(router.name, (None, 0))
    plain = default and not set(router.options) - {"jitter", "weight", option}
    if not plain or experts.name != "stacked" or set(experts.options) - _PLAIN_EXPERTS:
        return _asked(config, length)
    if config.shared_expert is not None:
        return _asked(config, length)
    choices = min(int(router.options.get(option or "", default)), config.num_experts)
    number, d_model = config.num_experts, config.d_model
    width = int(experts.options.get("d_ff", config.d_ff))
    gate: tuple[tuple[int, ...], ...] = ((number, d_model),)
    gate += ((number,),) if config.router_bias else ()
    inner = ((number, width, d_model),) * (2 if config.is_gated else 1)
    return LayerCost(
        router=sum(map(math.prod, gate)),
        branch=0,
        common=0,
        experts=(_network(config, width),) * number,
        choices=choices,
        rows=float(choices),
        stacks=(*inner, (number, d_model, width)),
        dense=gate,
    )


def _asked(config: SwitchConfig, length: int) -> LayerCost:
    """The cost of a sparse layer by its own account, on "meta"."""
    import torch

    from moezoo.assemble import make_moe
    from moezoo.experts import StackedExperts, ZeroExperts

    with torch.device("meta"):
        moe = make_moe(config, decoder=False)
    router, shared = moe.router, moe.shared
    common, experts = moe.experts.expert_sizes()
    rows = router.expert_rows(length)
    scores = router.has_logits + router.has_probs
    if router.soft:  # two dense maps between tokens and slots
        scores = round(2 * rows * length / config.num_experts)

    held = moe.experts.experts if type(moe.experts) is ZeroExperts else moe.experts
    stacks = list(held.parameters()) if type(held) is StackedExperts else []
    apart = {id(parameter) for parameter in stacks}

    return LayerCost(
        router=sum(p.numel() for p in router.parameters()),
        branch=0 if shared is None else sum(p.numel() for p in shared.parameters()),
        stacks=tuple(tuple(p.shape) for p in stacks),
        dense=tuple(tuple(p.shape) for p in moe.parameters() if id(p) not in apart),
        scores=scores,
        common=common,
        experts=experts,
        choices=len(experts) if router.soft else min(math.ceil(rows), len(experts)),
        rows=rows,
        bounds_load=router.soft or router.owns_capacity,
    )


def _network(config: SwitchConfig, width: int) -> int:
    return (3 if config.is_gated else 2) * config.d_model * width
