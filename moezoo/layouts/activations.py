"""What a training step keeps for backward, in bytes, operator by operator. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from moezoo.config import SwitchConfig
from moezoo.cost import LayerCost

_INDICES = 40  # per pair: its token, expert, row and order, int64
_WIDE = 4  # float32, in which norms, gates and the cross entropy compute


@dataclass(frozen=True)
class Batch:
    """What a rank computes on in a step.

    tokens: on each side, source and target. length: of a sequence. masked: whether an attention
    mask is given. width: bytes of an activation (2: bfloat16, 4: float32). fused: attention by a
    kernel that keeps no scores, as on a GPU; else what a CPU keeps of them.
    """

    tokens: int
    length: int
    masked: bool = False
    width: int = 2
    fused: bool = True


@dataclass(frozen=True)
class Kept:
    """Bytes of a rank. kept: from forward to backward. block: more of the largest block, while it
    is computed again (0 without recomputation). logits: more around the cross entropy.
    """

    kept: int
    block: int
    logits: int

    @property
    def total(self) -> int:
        return self.kept + max(self.block, self.logits)


def activations(
    config: SwitchConfig,
    layer: LayerCost,
    batch: Batch,
    *,
    task: str = "conditional_generation",
    recompute: bool = True,
) -> Kept:
    """What a training step keeps.

    Args:
        layer: the cost of a sparse layer of this config.
        task: "conditional_generation", "model" (no head) or "encoder".
        recompute: blocks keep their input alone and are computed again in backward.
    """
    stacks = ("encoder",) if task == "encoder" else ("encoder", "decoder")
    blocks = [
        _block(config, layer, batch, sparse=number in sparse, decoder=stack == "decoder")
        for stack in stacks
        for number, sparse in _layers(config, stack)
    ]
    d, n, masks = config.d_model, batch.width, config.d_model * _drops(config)
    routed = sum(number in sparse for stack in stacks for number, sparse in _layers(config, stack))
    per_token = len(stacks) * (8 + 2 * masks + _norm(config, batch) + n * d)
    if recompute:  # the routing leaves its block: it is part of the model's output
        per_token += len(blocks) * n * d
        per_token += round(routed * (_scores(layer) + layer.rows * _INDICES))
    else:
        per_token += sum(blocks)
    if task == "conditional_generation":  # logits, and their logarithms in float32
        per_token += 8 + n * d * config.scales_logits + (n + _WIDE) * config.vocab_size
    kept = batch.tokens * per_token + sum(
        _biases(config, batch, stack, recompute=recompute) for stack in stacks
    )
    gradient = _WIDE * config.vocab_size if task == "conditional_generation" else 0
    again = max(blocks) - n * d if recompute else 0
    return Kept(kept, batch.tokens * again, batch.tokens * gradient)


def _layers(config: SwitchConfig, stack: str) -> list[tuple[int, tuple[int, ...]]]:
    encoder = stack == "encoder"
    sparse = config.encoder_sparse if encoder else config.decoder_sparse
    return [(i, sparse) for i in range(config.num_layers if encoder else config.decoder_layers)]


def _block(
    config: SwitchConfig, layer: LayerCost, batch: Batch, *, sparse: bool, decoder: bool
) -> int:
    """Bytes per token of one block."""
    d, n = config.d_model, batch.width
    norm, masks = _norm(config, batch), d * _drops(config)
    total = norm + masks
    for learned in (True, False) if decoder else (True,):
        total += norm + n * d + _attention(config, batch, learned=learned) + masks
    if not sparse:
        return total + n * d + _dense_mlp(config, batch, config.d_ff)
    rows = layer.rows
    row = n * d + _expert(config, batch, _expert_width(config))
    gate_input = _WIDE * d if n < _WIDE else n * d
    mixed = n * d * max(rows, 1.0)  # what the weights multiply
    total += gate_input + _scores(layer) + round(rows * (row + _INDICES) + mixed)
    if config.shared_expert is not None:
        width = int(config.shared_expert.get("d_ff", config.d_ff))
        total += n * d + _branch(config, batch, width)
    return total


def _norm(config: SwitchConfig, batch: Batch) -> int:
    """float32 keeps the input; half precision, whose norms stay in float32, a copy in it and the
    result before the weight.
    """
    return _WIDE + config.d_model * (2 * _WIDE if batch.width < _WIDE else batch.width)


def _attention(config: SwitchConfig, batch: Batch, *, learned: bool) -> int:
    """Queries, keys, values, the mixed values, and what is kept per pair of query and key;
    learned: with a bias that has a gradient, which no kernel of a CPU knows.
    """
    n, inner, heads = batch.width, config.num_heads * config.d_kv, config.num_heads
    if batch.fused or not (config.dropout_rate or learned):
        return 4 * n * inner + _WIDE * heads  # and the sum of each row
    pairs = heads * batch.length
    if not config.dropout_rate:  # torch's composite, in float32
        return (3 * _WIDE + n) * inner + _WIDE * pairs
    # In float32 the sign of a weight says what was dropped.
    return 4 * n * inner + pairs * (n if n == _WIDE else 2 * n + 1)


def _dense_mlp(config: SwitchConfig, batch: Batch, width: int) -> int:
    n, drops = batch.width, _drops(config)
    if config.is_gated:
        return width * (4 * n + drops)
    if config.feed_forward_proj != "relu":
        return width * (2 * n + drops)
    # On a CPU the hidden units say by themselves what was dropped.
    return width * (2 * n + 1 if drops and batch.fused else n)


def _branch(config: SwitchConfig, batch: Batch, width: int) -> int:
    """Of the shared branch, whose dropout is torch's: on a CPU its mask is of the units' dtype."""
    n = batch.width
    units = 4 * n if config.is_gated else 2 * n
    return width * (units + _drops(config) * (1 if batch.fused else n))


def _expert(config: SwitchConfig, batch: Batch, width: int) -> int:
    """Per row; hidden units are computed again, but for relu's."""
    if config.feed_forward_proj == "relu":
        return batch.width * width
    return width * ((2 if config.is_gated else 1) * batch.width + _drops(config))


def _expert_width(config: SwitchConfig) -> int:
    given = config.experts.get("d_ff") if not isinstance(config.experts, str) else None
    return config.d_ff if given is None else int(given)


def _scores(layer: LayerCost) -> int:
    return _WIDE * layer.scores * len(layer.experts)


def _biases(config: SwitchConfig, batch: Batch, stack: str, *, recompute: bool) -> int:
    """Position biases of a stack, merged with its mask, and what merging keeps of them."""
    tables = 1
    if config.position_bias_every_layer:
        tables = config.num_layers if stack == "encoder" else config.decoder_layers
    if recompute:  # a block keeps the bias that it was handed, the last one's goes to nobody
        tables = max(tables - 1, 1)
    merged = not recompute and (batch.masked or stack == "decoder")
    rows = batch.tokens if batch.masked and stack == "encoder" else batch.length
    return tables * (2 if merged else 1) * batch.width * config.num_heads * rows * batch.length


def _drops(config: SwitchConfig) -> int:
    """Bytes of a dropout mask per element."""
    return 1 if config.dropout_rate else 0
