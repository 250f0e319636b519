"""The package's own components against references of a few lines, over drawn inputs."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import moezoo
from moezoo.capacity import CapacityPolicy
from moezoo.layer import MoE
from moezoo.records import Assignment, Routing, Tokens
from moezoo.routers import Router
from moezoo.testing.invariants import D_MODEL, VOCABULARY, Case
from moezoo.testing.strategies import cases, routing_of
from tests.properties.shares import share

few = settings(max_examples=share(4, 15))
drawn = cases(max_group=10, max_groups=3, max_experts=5)
Pairs = list[tuple[int, int]]


def build(name: str, case: Case, **options: Any) -> Router:
    torch.default_generator.manual_seed(case.seed)
    sizes = {"d_model": D_MODEL, "num_experts": case.num_experts, "vocab_size": VOCABULARY}
    router = moezoo.routers.build({"name": name, **options}, **sizes)
    with torch.no_grad():
        for parameter in router.parameters():
            if parameter.dim() == 2:
                parameter.normal_()
                if case.ties:
                    parameter.round_()
    return router.requires_grad_(False)


def policy(name: str, **options: Any) -> CapacityPolicy:
    return moezoo.capacity.build({"name": name, **options})


def sparse(routing: Routing) -> Assignment:
    assert isinstance(routing.assignment, Assignment)
    return routing.assignment


def kept(a: Assignment) -> Pairs:
    return list(zip(a.token[a.kept].tolist(), a.expert[a.kept].tolist(), strict=True))


def weights(a: Assignment) -> dict[tuple[int, int], float]:
    return dict(zip(kept(a), a.weight[a.kept].tolist(), strict=True))


def near(found: dict[Any, float], expected: dict[Any, float]) -> bool:
    return found.keys() == expected.keys() and all(
        abs(found[key] - expected[key]) <= 1e-5 * max(1.0, abs(expected[key])) for key in expected
    )


def real_tokens(tokens: Tokens) -> list[int]:
    flags = torch.ones(tokens.num_tokens).bool() if tokens.real is None else tokens.real
    return flags.nonzero().flatten().tolist()


def ranked(scores: Tensor) -> list[int]:
    """Indices of a row, highest first, ties to the lowest."""
    return sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))


def by_loop(a: Assignment, order: list[int], limit: int, *, everyone: bool = False) -> Pairs:
    """First come, first served, over pairs in the given order."""
    used: dict[tuple[int, int], int] = {}
    served = []
    for i in order:
        token, expert = int(a.token[i]), int(a.expert[i])
        queue = (token // max(a.group_size, 1), expert)
        if bool(a.kept[i]) or everyone:
            used[queue] = used.get(queue, 0) + 1
            if used[queue] <= limit and bool(a.kept[i]):
                served.append((token, expert))
    return served


@few
@given(drawn)
def test_switch_takes_the_most_probable_expert_at_its_probability(case: Case) -> None:
    router, tokens = build("switch", case), case.tokens()
    probs = (tokens.x @ router.classifier.weight.t()).softmax(-1)
    routing = router(tokens)
    expected = {(t, ranked(probs[t])[0]): float(probs[t].max()) for t in real_tokens(tokens)}
    assert near(weights(sparse(routing)), expected)
    assert routing.real is tokens.real


@few
@given(drawn)
def test_top_k_takes_the_k_most_probable_experts(case: Case) -> None:
    k = min(3, case.num_experts)
    tokens, expected = case.tokens(), {}
    router = build("top_k", case, k=k, normalize="before")
    logits = tokens.x @ router.classifier.weight.t()
    for t in real_tokens(tokens):
        best = ranked(logits[t])[:k]
        share = logits[t].softmax(-1)[best]
        share = share / share.sum() if k > 1 else share
        expected |= {(t, e): float(w) for e, w in zip(best, share, strict=True)}
    assert near(weights(sparse(router(tokens))), expected)


@few
@given(drawn)
def test_choices_are_made_before_any_rounding_to_bfloat16(case: Case) -> None:
    router, tokens = build("switch", case).bfloat16(), case.tokens(torch.bfloat16)
    router.classifier.weight.mul_(1e-3)  # probabilities that differ by less than bfloat16 sees
    probs = (tokens.x.float() @ router.classifier.weight.float().t()).softmax(-1)
    expected = {(t, ranked(probs[t])[0]): float(probs[t].max()) for t in real_tokens(tokens)}
    assert near(weights(sparse(router(tokens))), expected)


@few
@given(drawn)
def test_jitter_multiplies_the_input_in_training_alone(case: Case) -> None:
    router, x = build("switch", case, jitter=0.4), case.tokens().x
    zeros = router.train()(Tokens(torch.zeros_like(x))).logits
    assert torch.equal(zeros, torch.zeros_like(zeros))
    plain = x @ router.classifier.weight.t()
    assert torch.allclose(router.eval()(Tokens(x)).logits, plain, atol=1e-5)
    if x.numel() and case.num_experts > 1 and not case.ties:
        assert not torch.allclose(router.train()(Tokens(x)).logits, plain, atol=1e-5)


@few
@given(drawn)
def test_gshard_offers_the_second_expert_above_the_threshold_alone(case: Case) -> None:
    router, tokens, expected = build("gshard", case, second="threshold"), case.tokens(), {}
    probs = (tokens.x @ router.classifier.weight.t()).softmax(-1)
    for t in real_tokens(tokens):
        best = ranked(probs[t])[:2]
        share = probs[t][best] / probs[t][best].sum() if len(best) == 2 else probs[t][best]
        expected[(t, best[0])] = float(share[0])
        if len(best) == 2 and share[1] > 0.2:
            expected[(t, best[1])] = float(share[1])
    assert near(weights(sparse(router(tokens))), expected)


@few
@given(drawn)
def test_noise_never_reaches_an_evaluation(case: Case) -> None:
    k = min(2, case.num_experts)
    router, tokens = build("noisy_top_k", case, k=k).eval(), case.tokens()
    logits = tokens.x @ router.classifier.weight.t()
    expected = {(t, e) for t in real_tokens(tokens) for e in ranked(logits[t])[:k]}
    assert set(kept(sparse(router(tokens)))) == expected


@few
@given(drawn)
def test_the_balancing_bias_moves_choices_and_never_weights(case: Case) -> None:
    router, tokens, expected = build("sigmoid_top_k", case, k=1), case.tokens(), {}
    bias = case.noise(case.num_experts, purpose=9).abs()
    router.expert_bias.copy_(bias)
    scores = (tokens.x @ router.classifier.weight.t()).sigmoid()
    for t in real_tokens(tokens):
        chosen = ranked(scores[t] + bias)[0]
        expected[(t, chosen)] = float(scores[t, chosen])
    routing = router(tokens)
    assert near(weights(sparse(routing)), expected)
    load = torch.bincount(sparse(routing).expert[sparse(routing).kept], minlength=case.num_experts)
    router.adapt([routing])
    assert torch.equal((router.expert_bias - bias).sign(), (load.float().mean() - load).sign())


@few
@given(drawn)
def test_expert_choice_fills_every_expert_with_its_best_real_tokens(case: Case) -> None:
    router, tokens = build("expert_choice", case, factor=1.0), case.tokens()
    probs, real = (tokens.x @ router.classifier.weight.t()).softmax(-1), real_tokens(tokens)
    expected = set()
    for group in range(tokens.num_groups):
        mine = [t for t in real if t // tokens.group_size == group]
        slots = -(-len(mine) // case.num_experts)
        for e in range(case.num_experts):
            best = sorted(mine, key=lambda t, e=e: (-float(probs[t, e]), t))
            expected |= {(t, e) for t in best[:slots]}
    assert set(kept(sparse(router(tokens)))) == expected


@few
@given(drawn)
def test_a_threshold_once_set_alone_decides(case: Case) -> None:
    router, tokens = build("expert_threshold", case), case.tokens()
    router.num_updates += 1
    probs = (tokens.x @ router.classifier.weight.t()).softmax(-1)
    far = (probs - router.threshold).abs() > 1e-5
    expected = {
        (t, e)
        for t in real_tokens(tokens)
        for e in range(case.num_experts)
        if probs[t, e] >= router.threshold[e]
    }
    found = set(kept(sparse(router(tokens))))
    assert all(not bool(far[t, e]) for t, e in found ^ expected)


@few
@given(drawn)
def test_hash_relu_and_cosine_equal_their_formulas(case: Case) -> None:
    tokens = case.tokens()
    table = build("hash", case)
    expected = {(t, int(table.table[tokens.ids[t]])): 1.0 for t in real_tokens(tokens)}
    assert near(weights(sparse(table(tokens))), expected)
    relu = build("relu", case)
    gates = tokens.x @ relu.classifier.weight.t()
    clear = {(t, e): float(gates[t, e]) for t in real_tokens(tokens)
             for e in range(case.num_experts) if gates[t, e] > 1e-5}  # fmt: skip
    found = weights(sparse(relu(tokens)))
    assert near({pair: w for pair, w in found.items() if w > 1e-5}, clear)
    assert min(found.values(), default=0.0) >= 0.0
    cosine = build("cosine", case)
    longer = cosine(Tokens(tokens.x * 3.0, tokens.ids, tokens.real, tokens.group_size))
    assert torch.allclose(longer.logits, cosine(tokens).logits, atol=1e-3)


@few
@given(drawn)
def test_base_and_sinkhorn_balance_in_training_and_go_by_score_in_evaluation(case: Case) -> None:
    tokens, real = Tokens(case.tokens().x), case.num_tokens
    base = build("base", case)
    load = torch.bincount(sparse(base.train()(tokens)).expert, minlength=case.num_experts)
    assert int(load.max()) - int(load.min()) <= 1
    gates = tokens.x @ base.classifier.weight.t()
    expected = {(t, ranked(gates[t])[0]) for t in range(real)}
    assert set(kept(sparse(base.eval()(tokens)))) == expected
    plan = build("sinkhorn", case, iterations=64)
    gates = tokens.x @ plan.classifier.weight.t()
    assert set(kept(sparse(plan.eval()(tokens)))) == {(t, ranked(gates[t])[0]) for t in range(real)}


def test_sinkhorn_spreads_tokens_that_all_prefer_one_expert() -> None:
    router = build("sinkhorn", Case(num_experts=2, seed=1), iterations=200).train()
    x = Case(group_size=20, seed=3).tokens().x
    direction = router.classifier.weight[0] - router.classifier.weight[1]
    # A constant on one expert's scores moves its potential alone, not the plan.
    plain, skewed = (sparse(router(Tokens(x + s * direction))).expert for s in (0.0, 3.0))
    assert torch.equal(plain, skewed) and int(skewed.sum()) == 10
    assert bool(((x + 3.0 * direction) @ direction > 0).all())


@few
@given(drawn, st.integers(1, 3), st.integers(1, 4))
def test_every_policy_equals_a_loop(case: Case, k: int, limit: int) -> None:
    routing = routing_of(case, k)
    a = sparse(routing)
    n = a.num_pairs
    rank = {i: sum(int(a.token[j]) == int(a.token[i]) for j in range(i)) for i in range(n)}
    first = {int(a.token[i]): float(a.weight[i]) for i in range(n) if rank[i] == 0}
    orders = {
        "rank": list(range(n)),
        "token": sorted(range(n), key=lambda i: (int(a.token[i]), i)),
        "sure": sorted(range(n), key=lambda i: (rank[i], -first[int(a.token[i])], i)),
    }
    for order in ("rank", "token"):
        found = kept(policy("first_come", limit=limit, order=order)(routing))
        assert set(found) == set(by_loop(a, orders[order], limit)), order
    sure = kept(policy("batch_priority", limit=limit)(routing))
    assert set(sure) == set(by_loop(a, orders["sure"], limit))
    quirk = kept(policy("transformers", limit=limit)(routing))
    assert set(quirk) == set(by_loop(a, orders["rank"], limit, everyone=True))
    fair = policy("random_order", limit=limit).train()(routing)
    assert len(kept(fair)) == len(by_loop(a, orders["rank"], limit))


@few
@given(drawn, st.integers(1, 3))
def test_reroute_fills_free_places_with_the_next_best_expert(case: Case, limit: int) -> None:
    routing = routing_of(case, 1)
    a, used, place = sparse(routing), {}, {}
    order = [ranked(routing.probs[t]) for t in range(case.num_tokens)]
    for hop in range(case.num_experts):
        for t in range(case.num_tokens):
            queue = (t // max(case.group_size, 1), order[t][hop])
            if bool(a.kept[t]) and t not in place and used.get(queue, 0) < limit:
                used[queue] = used.get(queue, 0) + 1
                place[t] = order[t][hop]
    expected = {(t, e): float(routing.probs[t, e]) for t, e in place.items()}
    assert near(weights(policy("reroute", limit=limit)(routing)), expected)


@few
@given(drawn)
def test_the_switch_policy_drops_above_its_factor_in_training_alone(case: Case) -> None:
    routing = routing_of(case, 1)
    a = sparse(routing)
    slots = max(-(-5 * case.group_size // (4 * case.num_experts)), 1)
    trained = policy("switch").train()(routing)
    assert kept(trained) == by_loop(a, list(range(a.num_pairs)), slots)
    assert kept(policy("switch").eval()(routing)) == kept(a)


def loop_load_balance(routing: Routing, size: int) -> float:
    a, values = routing.offered, []
    assert isinstance(a, Assignment)
    for start in range(0, a.num_tokens, max(size, 1)):
        inside = [t for t in range(start, start + size) if routing.real is None or routing.real[t]]
        counts = [0] * a.num_experts
        for token, expert in kept(a):
            counts[expert] += token in inside
        if inside:
            mean = routing.probs[inside].mean(0)
            parts = [c / len(inside) * float(p) for c, p in zip(counts, mean, strict=True)]
            values.append(a.num_experts * sum(parts))
    return sum(values) / len(values) if values else 0.0


@few
@given(drawn, st.integers(1, 2))
def test_losses_equal_loops_over_real_tokens(case: Case, k: int) -> None:
    routing = routing_of(case, k)
    admitted = policy("first_come", limit=1)(routing)
    routing = Routing(admitted, routing.logits, routing.probs, {}, routing.real, sparse(routing))
    for scope, size in (("batch", case.num_tokens), ("group", case.group_size)):
        found = moezoo.losses.build({"name": "load_balance", "scope": scope})(routing)
        assert abs(float(found) - loop_load_balance(routing, size)) < 1e-4, scope
    real = real_tokens(Tokens(routing.logits, real=routing.real))
    squares = [float(routing.logits[t].logsumexp(-1)) ** 2 for t in real]
    z = sum(squares) / len(squares) if squares else 0.0
    assert abs(float(moezoo.losses.build("z")(routing)) - z) < 1e-3
    total = torch.zeros(case.num_experts)
    for (_, expert), weight in weights(routing.offered).items():
        total[expert] += weight
    variation = float(total.var(unbiased=False) / total.mean() ** 2) if real else 0.0
    assert abs(float(moezoo.losses.build("importance")(routing)) - variation) < 1e-3


@few
@given(drawn, st.sampled_from(["switch", "top_k", "expert_choice", "relu"]), st.integers(1, 3))
def test_a_layer_is_the_weighted_sum_of_its_kept_experts(case: Case, name: str, limit: int) -> None:
    options = {"k": min(2, case.num_experts)} if name == "top_k" else {}
    router, tokens = build(name, case, **options).double(), case.tokens(torch.float64)
    sizes = {"d_model": D_MODEL, "d_ff": 5, "num_experts": case.num_experts}
    experts = moezoo.experts.build("stacked", **sizes).double().requires_grad_(False)
    admit, group = policy("first_come", limit=limit), max(case.group_size, 1)
    layer = MoE(router, experts, capacity=admit, group=group)
    y, routing = layer(tokens.x, mask=tokens.real, token_ids=tokens.ids)
    expected = torch.zeros_like(tokens.x)
    for (t, e), weight in weights(sparse(routing)).items():
        hidden = (experts.wi[e] @ tokens.x[t]).relu()
        expected[t] += weight * (experts.wo[e] @ hidden)
    assert torch.allclose(y, expected, atol=1e-6)
