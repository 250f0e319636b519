"""The parameters of a model by shape, and how many of them FSDP2 leaves to a rank. Imports no
torch for plain models.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from moezoo.config import SwitchConfig
from moezoo.cost import LayerCost, layer_cost

Shape = tuple[int, ...]
_NO_LAYER = LayerCost(0, 0, 0, (), 0, 0.0)


@dataclass(frozen=True)
class Parameters:
    """Shapes of a model's parameters.

    root: of what belongs to no block. blocks: of each block's dense part, routers included.
    sparse: whether each block has experts. experts: of one layer's, (E, ..., ...) stacked, where
    they can be divided among ranks; those of other containers are dense. layer: the cost of a
    sparse layer.
    """

    root: tuple[Shape, ...]
    blocks: tuple[tuple[Shape, ...], ...]
    sparse: tuple[bool, ...]
    experts: tuple[Shape, ...]
    layer: LayerCost

    @property
    def dense(self) -> Iterable[Shape]:
        """All that is not in `experts`."""
        yield from self.root
        for block in self.blocks:
            yield from block

    def expert_parameters(self, gpus: int, ep: int, dense_over: int) -> int:
        """Of rank 0, all layers: whole experts of each, cut again along a width over dp; with ep 1
        whole ones as far as they go, like everything else.
        """
        if ep == 1:
            return sum(self.sparse) * on_rank(self.experts, dense_over, 0)
        return sum(self.sparse) * count(self.experts) // gpus


def count(shapes: Iterable[Shape]) -> int:
    """Numbers in tensors of these shapes."""
    return sum(map(math.prod, shapes))


def on_rank(shapes: Iterable[Shape], ranks: int, rank: int) -> int:
    """Numbers of these tensors on one of `ranks`: dimension 0 is cut into pieces of equal size,
    rounded up, so that the last ranks may have less, or nothing. A scalar is a vector of one.
    """
    total = 0
    for shape in shapes:
        rows, *rest = shape or (1,)
        piece = -(-rows // ranks)
        total += max(min(piece, rows - rank * piece), 0) * math.prod(rest)
    return total


def parameters(config: SwitchConfig, *, task: str, length: int) -> Parameters:
    """The shapes of a model. Raises ConfigError for components that cannot be built."""
    stacks = ("encoder",) if task == "encoder" else ("encoder", "decoder")
    sparse_of = {"encoder": config.encoder_sparse, "decoder": config.decoder_sparse}
    any_sparse = any(sparse_of[stack] for stack in stacks)
    layer = layer_cost(config, length=length) if any_sparse else _NO_LAYER
    table = (config.vocab_size, config.d_model)
    root: list[Shape] = [table, *((config.d_model,) for _ in stacks)]
    root += [table for stack in stacks if stack in config.own_embeddings]
    if task == "conditional_generation" and not config.tie_word_embeddings:
        root.append(table)
    blocks, sparse = [], []
    for stack in stacks:
        decoder = stack == "decoder"
        for number in range(config.decoder_layers if decoder else config.num_layers):
            has_experts = number in sparse_of[stack]
            if has_experts:
                mlp = layer.dense
            else:
                mlp = _mlp(config)
            biased = number == 0 or config.position_bias_every_layer
            blocks.append((*_attentions(config, decoder=decoder, biased=biased), *mlp))
            sparse.append(has_experts)
    return Parameters(tuple(root), tuple(blocks), tuple(sparse), layer.stacks, layer)


def _attentions(config: SwitchConfig, *, decoder: bool, biased: bool) -> Iterable[Shape]:
    """One or two attentions and all norms of a block."""
    d, inner = config.d_model, config.num_heads * config.d_kv
    for _ in range(2 if decoder else 1):
        yield from ((inner, d), (inner, d), (inner, d), (d, inner), (d,))
    yield (d,)
    if biased:
        yield (config.relative_attention_num_buckets, config.num_heads)


def _mlp(config: SwitchConfig) -> tuple[Shape, ...]:
    inner = ((config.d_ff, config.d_model),) * (2 if config.is_gated else 1)
    return (*inner, (config.d_model, config.d_ff))
