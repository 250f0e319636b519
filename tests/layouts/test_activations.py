"""What is kept for backward is within a tenth of what autograd saves in real models, and of what
their output holds.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

import moezoo
from moezoo.cost import layer_cost
from moezoo.layouts import Batch, activations
from moezoo.models.block import Block
from moezoo.models.norm import RMSNorm
from moezoo.records import Assignment, Routing

SIZES: dict[str, Any] = {
    "vocab_size": 97, "d_model": 64, "d_kv": 16, "d_ff": 160, "num_heads": 4, "num_layers": 2,
    "num_experts": 4,
}  # fmt: skip
ROWS, LENGTH = 4, 32


class Counter:
    """Bytes of all storages that autograd saves, but for those of weights."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.held: dict[int, torch.UntypedStorage] = {}  # alive, so that no address comes twice

    def see(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.held[storage.data_ptr()] = storage
        return tensor

    def __enter__(self) -> Counter:
        self.hooks = saved_tensors_hooks(self.see, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.held.values())


def made(dtype: torch.dtype, **changes: Any) -> tuple[moezoo.SwitchConfig, nn.Module]:
    config = moezoo.SwitchConfig(**{**SIZES, **changes})
    model = moezoo.build(config, seed=0, dtype=dtype).train()
    for module in model.modules():
        if isinstance(module, RMSNorm):  # as `moezoo.parallel.shard` leaves them
            module.float()
    return config, model


def counted(model: nn.Module, *, recompute: bool, masked: bool) -> int:
    """Bytes after a forward pass: what backward will use, and what the output holds."""
    model.gradient_checkpointing(recompute)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, SIZES["vocab_size"], (ROWS, LENGTH), generator=generator)
    mask = (torch.arange(LENGTH) < LENGTH - 2).expand(ROWS, LENGTH) if masked else None
    with Counter(model) as counter:
        output = model(ids, mask, labels=ids)
    results = [output.logits, output.last_hidden_state, output.encoder_last_hidden_state]
    for routing in output.routing:
        assert isinstance(routing, Routing) and isinstance(routing.assignment, Assignment)
        pairs = routing.assignment
        results += [routing.logits, routing.probs, pairs.token, pairs.expert, pairs.weight]
    for tensor in tree_leaves(results):
        if tensor is not None:
            counter.see(tensor)
    return counter.bytes


def reckoned(config: moezoo.SwitchConfig, *, recompute: bool, batch: Batch) -> int:
    return activations(config, layer_cost(config), batch, recompute=recompute).kept


MODELS: list[dict[str, Any]] = [
    {},
    {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    {"encoder_sparse_layers": "none", "decoder_sparse_layers": "none", "num_experts": 1},
    {"dropout_rate": 0.0},
    {"router": {"name": "top_k", "k": 2}, "experts": {"name": "stacked", "d_ff": 96}},
    {"position_bias_every_layer": True, "feed_forward_proj": "gelu"},
    {"num_decoder_layers": 1, "encoder_sparse_layers": "all", "num_experts": 32},
    {"shared_expert": {"d_ff": 64}, "vocab_size": 512},
    {"router": "streamed_switch", "num_experts": 32},
    {"d_model": 128, "num_heads": 8, "num_layers": 4},
]


@pytest.mark.parametrize("changes", MODELS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_kept_is_within_a_tenth_of_what_is_counted(
    changes: dict[str, Any], dtype: torch.dtype
) -> None:
    config, model = made(dtype, **changes)
    masked = len(str(changes)) % 2 == 0
    for recompute in (False, True):
        found = counted(model, recompute=recompute, masked=masked)
        batch = Batch(ROWS * LENGTH, LENGTH, masked, dtype.itemsize, fused=False)
        assert reckoned(config, recompute=recompute, batch=batch) == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize("length", [16, 64])
@pytest.mark.parametrize("masked", [False, True])
def test_it_grows_with_length_and_masks_as_what_is_counted_does(length: int, masked: bool) -> None:
    config, model = made(torch.bfloat16, vocab_size=512)
    model.gradient_checkpointing()
    mask = (torch.arange(length) < length - 1).expand(2, length) if masked else None
    ids = torch.randint(2, 500, (2, length), generator=torch.Generator().manual_seed(0))
    with Counter(model) as counter:
        output = model(ids, mask, labels=ids)
    for tensor in (output.logits, output.last_hidden_state, output.encoder_last_hidden_state):
        counter.see(tensor)
    batch = Batch(2 * length, length, masked, 2, fused=False)
    found = reckoned(config, recompute=True, batch=batch)
    assert found == pytest.approx(counter.bytes, rel=0.1)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("proj", ["relu", "gated-silu"])
def test_the_block_that_is_computed_again_keeps_what_one_is_counted_to(
    sparse: bool, proj: str
) -> None:
    layers = "all" if sparse else "none"
    config, model = made(
        torch.bfloat16,
        feed_forward_proj=proj,
        encoder_sparse_layers=layers,
        decoder_sparse_layers=layers,
    )
    block = model.decoder.blocks[-1]
    assert isinstance(block, Block)
    x = torch.randn(ROWS, LENGTH, 64).bfloat16().requires_grad_()
    bias = torch.zeros(1, 4, LENGTH, LENGTH, dtype=torch.bfloat16, requires_grad=True)
    memory = torch.randn(ROWS, LENGTH, 64).bfloat16().requires_grad_()
    counter = Counter(model)
    for tensor in (x, bias, memory):
        counter.weights.add(tensor.untyped_storage().data_ptr())  # held already
    with counter:
        _, _, routing = block(x, bias, memory=memory)
    for tensor in () if routing is None else (routing.logits, routing.probs):
        counter.see(tensor)
    batch = Batch(ROWS * LENGTH, LENGTH, False, 2, fused=False)
    found = activations(config, layer_cost(config), batch)
    block_input = ROWS * LENGTH * 64 * 2
    assert found.block + block_input == pytest.approx(counter.bytes, rel=0.1)
    assert activations(config, layer_cost(config), batch, recompute=False).block == 0
