"""Layers, tapes and models in use: recording, recomputation, odd inputs, experts without rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import moezoo
from moezoo.errors import MoezooError
from moezoo.layer import MoE
from moezoo.records import Routing
from moezoo.testing.invariants import D_MODEL, VOCABULARY, Case
from moezoo.testing.strategies import cases, routing_of
from moezoo.training.batches import ExampleBatches
from moezoo.training.span_corruption import SpanCorruption
from tests.properties.shares import share

few = settings(max_examples=share(4, 10))
drawn = cases(max_group=6, max_groups=3, max_experts=4)


def layer(case: Case, **options: Any) -> MoE:
    """A layer whose weights are N(0, 1), so that choices and outputs are clear."""
    torch.default_generator.manual_seed(case.seed)
    built = moezoo.SparseMLP(D_MODEL, 5, case.num_experts, **options).moe
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_()
    return built.train(case.training)


def batch(case: Case, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, L, D)."""
    return case.tokens(dtype).x.view(case.groups, case.group_size, D_MODEL)


@few
@given(drawn, st.sampled_from(["batch", "sequence", 4]))
def test_strided_input_gives_what_its_copy_gives(case: Case, group: str | int) -> None:
    sparse, x = layer(case, group=group), batch(case)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(sparse(strided)[0], sparse(x)[0])
    wide = torch.cat([x, x], dim=-1)[..., :D_MODEL]
    assert torch.equal(sparse(wide)[0], sparse(x)[0])


@few
@given(drawn, st.sampled_from(["stacked", "modules", "lora", "zero"]))
def test_every_expert_has_a_gradient_hit_or_not(case: Case, container: str) -> None:
    sparse = layer(case, experts=container, capacity={"name": "first_come", "limit": 1})
    sparse(batch(case))[0].square().sum().backward()
    missing = [name for name, p in sparse.named_parameters() if p.grad is None]
    assert missing == []


@few
@given(drawn, st.sampled_from(["relu", "gated-gelu"]))
def test_experts_compute_in_the_precision_of_the_layer(case: Case, activation: str) -> None:
    sparse = layer(case, activation=activation, capacity="dropless")
    before = {name: (p.dtype, id(p)) for name, p in sparse.named_parameters()}
    x = batch(case)
    y, routing = sparse(x)
    assert y.dtype == torch.float32
    assert {name: (p.dtype, id(p)) for name, p in sparse.named_parameters()} == before
    flat, experts, expected = x.view(-1, D_MODEL), sparse.experts, []
    for t, e in enumerate(routing.assignment.expert.tolist()):
        if activation == "relu":
            hidden = (flat[t].double() @ experts.wi[e].double().t()).relu()
        else:
            gate = flat[t].double() @ experts.wi_0[e].double().t()
            gate = torch.nn.functional.gelu(gate, approximate="tanh")
            hidden = gate * (flat[t].double() @ experts.wi_1[e].double().t())
        expected.append(routing.assignment.weight[t] * (hidden @ experts.wo[e].double().t()))
    wanted = torch.stack(expected) if expected else torch.zeros(0, D_MODEL).double()
    assert torch.allclose(y.view(-1, D_MODEL).double(), wanted, atol=1e-4, rtol=1e-4)


@few
@given(drawn)
def test_recomputation_is_recorded_once_and_costs_no_gradient(case: Case) -> None:
    found = []
    for saving in (False, True):
        sparse, x = layer(case, router={"name": "switch", "jitter": 0.1}), batch(case)
        torch.default_generator.manual_seed(1)
        with moezoo.record(sparse) as tape, set_checkpoint_early_stop(False):
            x.requires_grad_()
            y, _ = checkpoint(sparse, x, use_reentrant=False) if saving else sparse(x)
            y.square().sum().backward()
        assert [len(calls) for calls in tape.by_layer.values()] == [1]
        assert [s.tokens for s in tape.stats().values()] == [case.num_tokens]
        found.append([p.grad.clone() for p in sparse.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@few
@given(drawn)
def test_a_tape_holds_its_own_block_alone(case: Case) -> None:
    sparse, x = layer(case), batch(case)
    values = []
    for _ in range(3):
        with moezoo.record(sparse) as tape:
            sparse(x)
        sparse(x)  # after the block: nobody listens
        assert [len(calls) for calls in tape.by_layer.values()] == [1]
        values.append(float(tape.loss({"load_balance": 1.0, "z": 0.5}).detach()))
    assert len(set(values)) == 1
    assert sum(len(m._forward_hooks) for m in sparse.modules()) == 0


@few
@given(drawn)
def test_a_loss_counts_every_call_once(case: Case) -> None:
    two = nn.ModuleList([layer(case), layer(Case(**{**case.__dict__, "seed": case.seed + 1}))])
    x, single = batch(case), []
    with moezoo.record(two) as tape:
        for sparse in two:
            single.append(sparse(x)[1])
    for name in ("load_balance", "z", "importance"):
        values = [float(moezoo.losses.build(name)(routing).detach()) for routing in single]
        total = float(tape.loss({name: 0.5}).detach())
        assert abs(total - 0.25 * sum(values)) <= 1e-5 * max(1.0, sum(values)), name


@few
@given(cases(max_group=6, min_tokens=1, max_experts=4))
def test_a_loss_that_would_train_nothing_is_refused(case: Case) -> None:
    sparse, x = layer(case), batch(case).requires_grad_()
    with moezoo.record(sparse) as tape:
        checkpoint(lambda z: sparse(z)[0], x, use_reentrant=True)
    with pytest.raises(MoezooError, match="use_reentrant=False"):
        tape.loss({"load_balance": 0.01})


@few
@given(drawn, st.integers(1, 3))
def test_statistics_count_real_tokens_alone(case: Case, limit: int) -> None:
    tokens = case.tokens()
    sparse = layer(case, capacity={"name": "first_come", "limit": limit})
    mask = None if tokens.real is None else tokens.real.view(case.groups, case.group_size)
    with moezoo.record(sparse) as tape:
        _, routing = sparse(batch(case), mask=mask)
    (stats,) = tape.stats().values()
    real = case.num_tokens if tokens.real is None else int(tokens.real.sum())
    loads = [0] * case.num_experts
    for t in range(case.num_tokens):
        if tokens.real is None or tokens.real[t]:
            loads[int(routing.probs[t].argmax())] += 1
    computed = [min(load, limit) for load in loads]
    assert (stats.tokens, stats.offered, stats.load) == (real, real, loads)
    assert stats.computed == computed
    assert abs(stats.dropped - (1.0 - sum(computed) / real if real else 0.0)) < 1e-6
    assert stats.dead == [e for e, n in enumerate(computed) if n == 0]


@pytest.mark.parametrize(
    "name", ["first_come", "batch_priority", "random_order", "reroute", "transformers"]
)
@few
@given(number=st.integers(max_value=0))
def test_a_limit_below_one_is_refused(name: str, number: int) -> None:
    with pytest.raises(MoezooError, match="limit"):
        moezoo.capacity.build({"name": name, "limit": number})


@few
@given(drawn, st.integers(1, 3), st.sampled_from(["first_come", "random_order", "batch_priority"]))
def test_a_limit_binds_in_evaluation_too(case: Case, limit: int, name: str) -> None:
    routing = routing_of(case, 1)
    admitted = moezoo.capacity.build({"name": name, "limit": limit}).eval()(routing)
    key = (admitted.token // max(case.group_size, 1)) * case.num_experts + admitted.expert
    assert torch.bincount(key[admitted.kept], minlength=1).max() <= limit


@few
@given(cases(max_group=6, max_groups=2, max_experts=4), st.floats(1.0, 9.0))
def test_experts_may_choose_more_tokens_than_there_are(case: Case, factor: float) -> None:
    sizes = {"d_model": D_MODEL, "num_experts": case.num_experts}
    router = moezoo.routers.build({"name": "expert_choice", "factor": factor}, **sizes)
    routing: Routing = router(case.tokens())
    routing.assignment.check(routing.real)
    assert routing.assignment.num_pairs <= case.num_tokens * case.num_experts


def tiny(**options: Any) -> nn.Module:
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_heads": 2,
        "num_layers": 2, "num_experts": 4, "dropout_rate": 0.0,
    }  # fmt: skip
    return moezoo.build(moezoo.SwitchConfig(**(sizes | options)), seed=0)


@pytest.mark.parametrize("sparse_layers", ["odd", "all"])
def test_router_losses_train_wherever_the_sparse_layers_stand(sparse_layers: str) -> None:
    places = {"encoder_sparse_layers": sparse_layers, "decoder_sparse_layers": sparse_layers}
    ids = torch.arange(2, 14).view(2, 6)
    output = tiny(**places, router_losses={"load_balance": 0.5, "z": 0.5}).train()(ids, labels=ids)
    by_hand = [moezoo.losses.build("z")(routing) for routing in output.routing]
    assert len(by_hand) == (4 if sparse_layers == "all" else 2)
    assert torch.allclose(output.losses["z"], torch.stack(by_hand).mean())
    extra = 0.5 * (output.losses["z"] + output.losses["load_balance"])
    assert torch.allclose(output.loss, output.losses["cross_entropy"] + extra)
    assert float(extra.detach()) > 0.0


def test_labels_that_ask_for_nothing_give_a_loss_of_zero() -> None:
    ids = torch.arange(2, 14).view(2, 6)
    model = tiny()
    output = model(ids, labels=torch.full((2, 6), -100), decoder_input_ids=ids)
    assert float(output.losses["cross_entropy"].detach()) == 0.0
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_cached_decode_equals_the_whole_sequence_whatever_training_drops() -> None:
    model = tiny(capacity={"name": "switch", "factor": 0.25}).eval()
    ids = torch.arange(2, 14).view(2, 6)
    whole = model(ids, decoder_input_ids=ids).logits
    cache, steps = None, []
    for place in range(6):
        output = model(ids, decoder_input_ids=ids[:, place : place + 1], past_key_values=cache,
                       use_cache=True)  # fmt: skip
        cache = output.past_key_values
        steps.append(output.logits)
    assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-4)


@torch.no_grad()
def test_a_stack_reads_its_own_table_in_a_cached_decode_too() -> None:
    model = tiny(own_embeddings=("encoder", "decoder"), tie_word_embeddings=False).eval()
    ids = torch.randint(2, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(1))
    tables = [stack.embed_tokens(ids) for stack in (model.encoder, model.decoder)]
    found = model(ids, decoder_input_ids=ids).logits
    assert torch.equal(
        model(inputs_embeds=tables[0], decoder_inputs_embeds=tables[1]).logits, found
    )
    answer = model.generate(ids, max_new_tokens=4, min_new_tokens=4)
    scores = model(ids, decoder_input_ids=answer[:, :-1]).logits
    scores[..., model.config.eos_token_id] = -torch.inf
    assert torch.equal(scores.argmax(-1), answer[:, 1:])


@torch.no_grad()
def test_new_tokens_have_the_mean_logit_of_the_old() -> None:
    model = tiny().eval()
    ids = torch.randint(2, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(1))
    before = model(ids, decoder_input_ids=ids).logits
    after = moezoo.resize_embeddings(model, VOCABULARY + 3)(ids, decoder_input_ids=ids).logits
    torch.testing.assert_close(after[..., :VOCABULARY], before)
    mean = before.mean(-1, keepdim=True).expand(-1, -1, 3)
    torch.testing.assert_close(after[..., VOCABULARY:], mean, rtol=1e-3, atol=1e-3)


def test_masked_spans_of_bytes_stand_under_the_ids_that_pre_training_counted_down() -> None:
    corruption = SpanCorruption(moezoo.ByteTokenizer(), mean_span=2.0)
    _, target = corruption(torch.full((40,), 100), torch.Generator().manual_seed(0))
    assert [token for token in target if token != 100] == [258, 257, 256, 1]


def test_a_batch_is_filled_up_with_the_padding_that_it_was_given() -> None:
    rows = [([5], [6]), ([5, 5, 5], [6])]
    batches = ExampleBatches(2, lambda index, epoch: rows[index], batch_size=2, pad_id=7)
    sources = batches(0)["input_ids"].tolist()
    assert sorted(sources) == [[5, 5, 5], [5, 7, 7]]
