"""What a config costs: parameters, FLOPs and bytes by arithmetic. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from moezoo.config import SwitchConfig

BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True)
class Cost:
    """Sizes of a model with the stacked container and a linear router.

    parameters: all. active: those that one token of encoder and decoder uses, each embedding table
    counted once. flops_per_token: of one forward pass through both stacks, two per multiplication,
    attention scores at `length` tokens included. expert_parameters: within experts.
    """

    parameters: int
    active: int
    expert_parameters: int
    router_parameters: int
    flops_per_token: int

    def bytes(self, dtype: str) -> int:
        """Bytes of the weights in a dtype of `BYTES`."""
        return self.parameters * BYTES[dtype]


def cost(
    config: SwitchConfig,
    *,
    task: str = "conditional_generation",
    choices: int = 1,
    length: int = 512,
) -> Cost:
    """The cost of a model.

    Args:
        task: "conditional_generation", "model" (no head) or "encoder", as `build` takes it.
        choices: experts per token. length: tokens per sequence, for attention.
    """
    decoders = 0 if task == "encoder" else config.decoder_layers
    has_head = task == "conditional_generation"
    inner = config.num_heads * config.d_kv
    attention = 4 * config.d_model * inner
    mlp = (3 if config.is_gated else 2) * config.d_model * config.d_ff
    router = config.num_experts * (config.d_model + int(config.router_bias))
    sparse = len(config.encoder_sparse) + (len(config.decoder_sparse) if decoders else 0)
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
    shared = dense_matrices + norms + biases + tables_of_tokens + sparse * router
    experts = sparse * config.num_experts * mlp
    matrices = dense_matrices + sparse * (choices * mlp + router)
    matrices += embedding if has_head else 0
    scores = 2 * inner * length * (config.num_layers + 2 * decoders)
    return Cost(
        parameters=shared + experts,
        active=shared + sparse * min(choices, max(config.num_experts, 1)) * mlp,
        expert_parameters=experts,
        router_parameters=sparse * router,
        flops_per_token=2 * (matrices + scores),
    )
