"""Noisy top-k: noise in training only, the smooth load of appendix A."""

from __future__ import annotations

import math

import torch

from tests.routers.batches import batch, make, pairs, sparse


def test_without_noise_the_weights_are_the_softmax_of_the_chosen_scores() -> None:
    tokens, router = batch(8, padded=True), make("noisy_top_k", k=2).eval()
    assert tokens.real is not None
    wanted, weights = [], []
    for t, row in enumerate((tokens.x @ router.classifier.weight.T).tolist()):
        best = sorted(range(4), key=lambda e: (-row[e], e))[:2]
        total = sum(math.exp(row[e]) for e in best)
        for rank, e in enumerate(best):
            if tokens.real[t]:
                wanted.append((rank, t, e))
                weights.append((rank, t, math.exp(row[e]) / total))
    routing = router(tokens)
    assert pairs(routing) == [(t, e) for _, t, e in sorted(wanted)]
    got = sparse(routing).weight[sparse(routing).kept]
    assert torch.allclose(got, torch.tensor([w for *_, w in sorted(weights)]), atol=1e-6)


def test_noise_is_drawn_in_training_only() -> None:
    tokens, router = batch(64), make("noisy_top_k")
    assert pairs(router.eval()(tokens)) == pairs(router.eval()(tokens))
    assert pairs(router.train()(tokens)) != pairs(router.train()(tokens))


def test_load_loss_equals_a_loop_over_the_normal_distribution() -> None:
    tokens, router = batch(8, padded=True), make("noisy_top_k", k=2).eval()
    assert tokens.real is not None
    scores = tokens.x @ router.classifier.weight.T
    scales = torch.nn.functional.softplus(tokens.x @ router.noise.weight.T)
    load = [0.0] * 4
    for t in range(8):
        for e in range(4):
            others = sorted((scores[t, o].item() for o in range(4) if o != e), reverse=True)
            z = (scores[t, e].item() - others[1]) / scales[t, e].item()
            load[e] += 0.5 * (1 + math.erf(z / math.sqrt(2))) if tokens.real[t] else 0.0
    mean = sum(load) / 4
    wanted = sum((n - mean) ** 2 for n in load) / 4 / mean**2
    assert math.isclose(router(tokens).losses["load"].item(), wanted, rel_tol=1e-4)


def test_load_loss_trains_the_noise_gate() -> None:
    router = make("noisy_top_k").train()
    router(batch(32)).losses["load"].backward()
    assert router.noise.weight.grad.abs().sum() > 0


def test_expected_load_adds_up_to_about_k_per_token() -> None:
    torch.manual_seed(0)
    router = make("noisy_top_k", k=2)
    tokens = batch(1)
    clean = tokens.x @ router.classifier.weight.T
    scale = torch.nn.functional.softplus(tokens.x @ router.noise.weight.T)
    draws = clean + torch.randn(4000, 4) * scale
    chosen = torch.zeros(4).index_add_(0, draws.topk(2).indices.flatten(), torch.ones(8000)) / 4000
    wide = clean.expand(4000, 4), draws, scale.expand(4000, 4), draws.topk(3).indices
    smooth = router._expected_load(*wide).mean(0)
    assert torch.allclose(chosen, smooth, atol=0.03)
