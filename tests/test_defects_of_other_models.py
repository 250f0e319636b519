"""Defects of whole models that others shipped: the wrong code is kept here and fails what holds for
ours."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moezoo
from moezoo.functional.assign import token_choice
from moezoo.records import Routing, Tokens


def kept_per_sequence(expert_BL: Tensor, num_experts: int, capacity: int) -> Tensor:
    """Wrong: an absolute number of places per expert and sequence, whatever its length."""
    place = (F.one_hot(expert_BL, num_experts).cumsum(1) - 1).gather(2, expert_BL[..., None])
    return place[..., 0] < capacity


class Recasts(nn.Module):
    """Wrong: forward gives the classifier another dtype; experts compute in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier, self.expert = nn.Linear(8, 4, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        self.classifier = self.classifier.float()
        gate = self.classifier(x.float()).softmax(-1).amax(-1, keepdim=True)
        return (gate * F.linear(x.bfloat16(), self.expert.weight.bfloat16())).to(x.dtype)


def tiny(**options: object) -> nn.Module:
    sizes = {"vocab_size": 32, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_heads": 2,
             "num_layers": 2, "num_experts": 4, "dropout_rate": 0.0}  # fmt: skip
    return moezoo.build(moezoo.SwitchConfig(**(sizes | options)), seed=0)


def ids() -> Tensor:
    return torch.arange(2, 14).view(2, 6)


def test_a_long_balanced_sequence_loses_nobody() -> None:
    expert = (torch.arange(1024) % 8)[None]
    wrong = kept_per_sequence(expert, 8, 64)
    assert float(wrong.float().mean()) == 0.5, "half of the tokens dropped at 1,024 tokens"
    probs = F.one_hot(expert[0], 8).float()
    pairs = token_choice(probs, probs, 1, Tokens(probs))
    for training in (True, False):
        kept = moezoo.capacity.build("switch").train(training)(Routing(pairs, probs=probs)).kept
        assert bool(kept.all())


def test_one_token_at_a_time_equals_the_whole_sequence() -> None:
    expert = torch.zeros(1, 6, dtype=torch.int64)
    whole = kept_per_sequence(expert, 4, 2)
    steps = torch.cat([kept_per_sequence(expert[:, i : i + 1], 4, 2) for i in range(6)], 1)
    assert not torch.equal(whole, steps), "a cached decode sees shorter queues"
    layer = moezoo.SparseMLP(8, 8, 4, capacity={"name": "switch", "factor": 0.25}).eval()
    x = torch.randn(1, 6, 8)
    alone = torch.cat([layer(x[:, i : i + 1]) for i in range(6)], 1)
    assert torch.allclose(layer(x), alone, atol=1e-6)


def test_losses_count_when_every_layer_is_sparse() -> None:
    def wrong(logits: list[Tensor], step: int) -> Tensor:
        """Sparse layers looked for at i % step == 1, which never holds for a step of 1."""
        found = [z.logsumexp(-1).square().mean() for i, z in enumerate(logits) if i % step == 1]
        return torch.stack(found).mean() if found else torch.zeros(())

    every = {"encoder_sparse_layers": "all", "decoder_sparse_layers": "all"}
    output = tiny(**every, router_losses={"z": 0.5})(ids(), labels=ids())
    assert float(wrong([r.logits.detach() for r in output.routing], 1)) == 0.0
    assert len(output.routing) == 4
    added = output.loss - output.losses["cross_entropy"]
    assert float(output.losses["z"].detach()) > 1e-3
    assert torch.allclose(added, 0.5 * output.losses["z"])


def test_gated_experts_multiply_by_their_gate() -> None:
    experts = moezoo.experts.build(
        {"name": "stacked", "activation": "gated-gelu"}, d_model=8, d_ff=8, num_experts=1
    )
    x = torch.randn(5, 8)
    act = F.gelu(x @ experts.wi_0[0].t(), approximate="tanh")
    wrong = act @ experts.wo[0].t()  # an expert that knows one inner projection
    right = (act * (x @ experts.wi_1[0].t())) @ experts.wo[0].t()
    found = experts(x, torch.tensor([5]))
    assert not torch.allclose(wrong, right, atol=1e-3)
    assert torch.allclose(found, right, atol=1e-5)


def test_labels_that_ask_for_nothing_are_no_nan() -> None:
    labels = torch.full((2, 6), -100)
    output = tiny()(ids(), labels=labels, decoder_input_ids=ids())
    wrong = F.cross_entropy(output.logits.detach().flatten(0, 1), labels.flatten())
    assert bool(torch.isnan(wrong))
    assert float(output.losses["cross_entropy"].detach()) == 0.0


def test_a_layer_keeps_its_dtypes_and_computes_in_them() -> None:
    wrong = Recasts().double()
    x = torch.randn(5, 8, dtype=torch.float64)
    y = wrong(x)
    assert wrong.classifier.weight.dtype == torch.float32
    gate = wrong.classifier(x.float()).softmax(-1).amax(-1, keepdim=True).double()
    assert not torch.allclose(y, gate * wrong.expert(x), atol=1e-6), "experts in bfloat16"
    layer = moezoo.SparseMLP(8, 8, 1).double()
    before = {name: p.dtype for name, p in layer.named_parameters()}
    hidden = (x @ layer.moe.experts.wi[0].t()).relu() @ layer.moe.experts.wo[0].t()
    assert torch.allclose(layer(x), hidden, atol=1e-12)
    assert {name: p.dtype for name, p in layer.named_parameters()} == before
