"""Defects that leading libraries shipped: each claim fails on the wrong code, kept here, and holds
for ours."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import moezoo
from moezoo.errors import MoezooError
from moezoo.functional.assign import best_experts, pairs_of
from moezoo.functional.losses import load_balance, masked_mean, z_loss
from moezoo.functional.queues import queue_positions
from moezoo.layer import MoE
from moezoo.records import Assignment, Routing, Tokens

D_MODEL = 8


def queue_of_one(expert_T: Tensor, num_experts: int = 2, real: Tensor | None = None) -> Assignment:
    """Top-1 pairs with weight 1/2, in one group."""
    tokens = Tokens(torch.zeros(expert_T.numel(), D_MODEL), real=real)
    weight = torch.full((expert_T.numel(), 1), 0.5)
    return pairs_of(expert_T[:, None], weight, num_experts, tokens)


def admitted(name: str, limit: int, a: Assignment) -> list[int]:
    kept = moezoo.capacity.build({"name": name, "limit": limit}).train()(Routing(a))
    return kept.token[kept.kept].tolist()


def layer(num_experts: int = 4, **options: object) -> MoE:
    torch.manual_seed(0)
    built = moezoo.SparseMLP(D_MODEL, 16, num_experts, **options).moe
    torch.nn.init.normal_(built.router.classifier.weight)
    return built


def test_position_order_keeps_the_earliest_of_equal_tokens() -> None:
    mask = torch.ones(200, 1)  # every token chose the same expert: nothing but ties
    by_topk = mask.topk(8, dim=0).indices.flatten().sort().values.tolist()
    ours = admitted("first_come", 8, queue_of_one(torch.zeros(200, dtype=torch.int64)))
    assert by_topk != list(range(8))
    assert ours == list(range(8))


def test_capacity_keeps_exactly_c_tokens() -> None:
    expert = torch.zeros(6, dtype=torch.int64)
    running = F.one_hot(expert, 2).cumsum(0)[:, 0]
    assert int((running < 3).sum()) == 2, "an inclusive running sum with < keeps one too few"
    assert admitted("first_come", 3, queue_of_one(expert)) == [0, 1, 2]


def test_padding_takes_no_capacity() -> None:
    real = torch.tensor([False, False, True, True])
    expert = torch.zeros(4, dtype=torch.int64)
    with_padding = F.one_hot(expert, 2).cumsum(0)[:, 0] <= 2
    assert not bool((with_padding & real).any()), "padding took both places"
    assert admitted("first_come", 2, queue_of_one(expert, real=real)) == [2, 3]


@pytest.mark.parametrize("name", ["first_come", "random_order", "batch_priority", "reroute"])
def test_capacity_binds_whatever_the_order_of_service(name: str) -> None:
    expert = torch.zeros(9, dtype=torch.int64)
    ignoring = queue_of_one(expert)
    assert int(ignoring.kept.sum()) > 2
    routing = Routing(ignoring, probs=torch.tensor([[0.9, 0.1]]).repeat(9, 1))
    kept = moezoo.capacity.build({"name": name, "limit": 2}).train()(routing)
    loads = torch.bincount(kept.expert[kept.kept], minlength=2)
    assert int(loads[0]) == 2
    assert int(loads.max()) == 2


def test_capacity_above_the_number_of_tokens_is_no_error() -> None:
    with pytest.raises(RuntimeError):
        torch.ones(3, 2).topk(5, dim=0)  # the wrong way to choose whom to keep
    a = queue_of_one(torch.tensor([0, 1, 0]))
    for name in ("first_come", "random_order", "batch_priority"):
        assert sorted(admitted(name, 5, a)) == [0, 1, 2]


@pytest.mark.parametrize("limit", [-1, 0])
def test_a_capacity_below_one_is_refused(limit: int) -> None:
    positions = queue_positions(queue_of_one(torch.zeros(4, dtype=torch.int64)))
    assert not bool((positions < limit).any()), "unchecked, it drops every token in silence"
    with pytest.raises(MoezooError, match="limit"):
        moezoo.capacity.build({"name": "first_come", "limit": limit})


def test_pairs_name_the_token_that_chose() -> None:
    expert_TK = torch.tensor([[0, 1], [2, 0], [1, 2]])
    tokens = Tokens(torch.zeros(3, D_MODEL))
    a = pairs_of(expert_TK, torch.full((3, 2), 0.5), 3, tokens)
    chosen = {(t, e) for t in range(3) for e in expert_TK[t].tolist()}
    transposed = set(zip(a.token.tolist(), expert_TK.reshape(-1).tolist(), strict=True))
    assert transposed != chosen
    assert set(zip(a.token.tolist(), a.expert.tolist(), strict=True)) == chosen


def test_a_dropped_token_gets_exactly_zero() -> None:
    sparse = layer(capacity={"name": "first_come", "limit": 1})
    x = torch.randn(12, D_MODEL)
    y, routing = sparse(x)
    dropped = torch.ones(12, dtype=torch.bool)
    dropped[routing.assignment.token[routing.assignment.kept]] = False
    passed_on = torch.where(dropped[:, None], routing.probs.amax(-1, keepdim=True) * x, y)
    assert bool(dropped.any())
    assert bool((passed_on[dropped] != 0).any()), "a dropped token scaled by its gate"
    assert bool((y[dropped] == 0).all())


def test_z_loss_sees_the_size_of_the_logits() -> None:
    logits = torch.randn(5, 4)
    probs = logits.softmax(-1)
    assert torch.allclose(z_loss(probs), z_loss((logits + 9.0).softmax(-1)))
    assert float(z_loss(logits + 9.0)) > float(z_loss(logits)) + 9.0


def test_losses_do_not_count_padding() -> None:
    logits, real = torch.randn(6, 4), torch.tensor([True, True, True, False, False, False])
    other = torch.where(real[:, None], logits, logits + 5.0)
    squares = [value.logsumexp(-1).square() for value in (logits, other)]
    assert not torch.allclose(squares[0].mean(), squares[1].mean())
    assert torch.equal(masked_mean(squares[0], real), masked_mean(squares[1], real))
    assert torch.equal(z_loss(logits, real), z_loss(other, real))


def test_two_collapsed_layers_never_look_balanced() -> None:
    def collapsed(on: int, size: int) -> tuple[Tensor, Assignment]:
        expert = torch.full((size,), on)
        return F.one_hot(expert, 2).float(), queue_of_one(expert)

    first, second = collapsed(0, 6), collapsed(1, 6)
    together = torch.cat([first[1].expert, second[1].expert])
    pooled = load_balance(torch.cat([first[0], second[0]]), queue_of_one(together))
    assert float(pooled) == 1.0, "pooled, a collapse reads as perfect balance"
    assert [float(load_balance(*one)) for one in (first, second)] == [2.0, 2.0]


def test_the_expert_is_chosen_before_rounding() -> None:
    logits = torch.tensor([[0.0, 0.001]])
    probs = logits.softmax(-1)
    assert int(probs.bfloat16().argmax(-1)) == 0
    assert int(best_experts(probs, 1)) == 1
    sparse = layer(2).bfloat16()
    with torch.no_grad():
        sparse.router.classifier.weight.zero_()[1, 0] = 0.001
    x = torch.zeros(1, D_MODEL, dtype=torch.bfloat16)
    x[0, 0] = 1.0
    assert sparse(x)[1].assignment.expert.tolist() == [1]


def test_autocast_leaves_the_gate_in_float32() -> None:
    sparse, x = layer(), torch.randn(7, D_MODEL)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(x, sparse.router.classifier.weight).dtype == torch.bfloat16
        assert sparse(x)[1].logits.dtype == torch.float32


def test_jitter_multiplies_the_input_of_the_router_alone() -> None:
    router = layer(router={"name": "switch", "jitter": 0.5}).train().router
    zeros, x = torch.zeros(4, D_MODEL), torch.randn(4, D_MODEL)
    added = F.linear(zeros, router.classifier.weight) + torch.empty(4, 4).uniform_(0.5, 1.5)
    assert bool((added != 0).any()), "jitter added to the logits"
    assert bool((router(Tokens(zeros)).logits == 0).all())
    written, ours = x.clone(), x.clone()
    written.mul_(torch.empty_like(x).uniform_(0.5, 1.5))
    router(Tokens(ours))
    assert not torch.equal(written, x)
    assert torch.equal(ours, x), "what the experts read"


def test_an_expert_without_tokens_has_a_gradient_of_zero() -> None:
    alone = torch.nn.ModuleList(torch.nn.Linear(D_MODEL, D_MODEL) for _ in range(2))
    alone[0](torch.randn(3, D_MODEL)).sum().backward()
    assert alone[1].weight.grad is None, "a loop over the experts that were hit"
    sparse = layer()
    sparse(torch.randn(1, D_MODEL))[0].square().sum().backward()
    gradients = sparse.experts.wi.grad.flatten(1).abs().amax(1)
    assert int((gradients == 0).sum()) == 3


def test_no_token_is_an_input_like_any_other() -> None:
    with pytest.raises(IndexError):
        torch.empty(0, 4).max(dim=0)  # the wrong way to find the busiest expert
    for shape in ((0, D_MODEL), (0, 5, D_MODEL), (2, 0, D_MODEL)):
        assert layer()(torch.zeros(shape))[0].shape == shape


def test_strided_input_gives_what_its_copy_gives() -> None:
    x = torch.randn(5, 3, D_MODEL).transpose(0, 1)
    with pytest.raises(RuntimeError):
        x.view(-1, D_MODEL)
    sparse = layer()
    assert torch.equal(sparse(x)[0], sparse(x.contiguous())[0])


def test_forward_keeps_the_dtype_of_parameters() -> None:
    sparse = layer().bfloat16()
    before = {name: (p.dtype, id(p)) for name, p in sparse.named_parameters()}
    recast = layer().bfloat16().router.float()
    assert all(p.dtype == torch.float32 for p in recast.parameters())
    sparse(torch.randn(4, D_MODEL, dtype=torch.bfloat16))
    assert {name: (p.dtype, id(p)) for name, p in sparse.named_parameters()} == before


def test_float64_stays_float64() -> None:
    x = torch.randn(5, D_MODEL, dtype=torch.float64)
    assert not torch.equal(x.bfloat16().double(), x)
    assert layer().double()(x)[0].dtype == torch.float64


def test_statistics_of_padded_batches_are_fractions() -> None:
    sparse = layer(capacity={"name": "first_come", "limit": 1})
    mask = torch.tensor([True] * 3 + [False] * 9)
    with moezoo.record(sparse) as tape:
        sparse(torch.randn(12, D_MODEL), mask=mask)
    (stats,) = tape.stats().values()
    assert 1.0 - 12 / 3 < 0.0, "all tokens over the real ones"
    assert 0.0 <= stats.dropped <= 1.0
    assert stats.offered == 3


def test_a_finished_step_leaves_no_graph_behind() -> None:
    kept: list[Tensor] = []
    sparse = layer()

    def step(store: list[Tensor] | None) -> weakref.ref[Tensor]:
        with moezoo.record(sparse) as tape:
            sparse(torch.randn(4, D_MODEL))
        loss = tape.loss({"load_balance": 1.0})
        if store is not None:
            store.append(loss)
        return weakref.ref(loss)

    leaked, ours = step(kept), step(None)
    gc.collect()
    assert leaked() is not None
    assert ours() is None


def test_recomputation_counts_no_token_twice() -> None:
    sparse, seen = layer(), []
    sparse.register_forward_hook(lambda module, inputs, output: seen.append(output[1]))
    x = torch.randn(6, D_MODEL, requires_grad=True)
    with moezoo.record(sparse) as tape, set_checkpoint_early_stop(False):
        checkpoint(lambda z: sparse(z)[0], x, use_reentrant=False).square().sum().backward()
    assert len(seen) == 2, "a plain hook sees the recomputation too"
    assert [s.tokens for s in tape.stats().values()] == [6]


def test_a_loss_that_lost_its_gradient_is_refused() -> None:
    sparse, x = layer(), torch.randn(6, D_MODEL, requires_grad=True)
    with moezoo.record(sparse) as tape:
        checkpoint(lambda z: sparse(z)[0], x, use_reentrant=True)
    (routings,) = tape.by_layer.values()
    assert not load_balance(routings[0].probs, routings[0].offered).requires_grad
    with pytest.raises(MoezooError, match="use_reentrant=False"):
        tape.loss({"load_balance": 0.01})
