"""Shrinking keeps what the weights of the remaining experts add up to."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moezoo
from moezoo import traces
from moezoo.adapters.checkpoint_source import open_checkpoint
from moezoo.adapters.upcycle.grow import grow
from moezoo.adapters.upcycle.likeness import distances, joined
from moezoo.adapters.upcycle.shrink import shrink
from moezoo.errors import ConfigError
from tests.conversion.dense import dense_t5, ids, relative

LAYER = "encoder.blocks.1.mlp"
WIDTH = 32
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def trained(
    path: Path, *, num_experts: int, std: float, twins: int = 0, noise: float = 0.0, **config: Any
) -> nn.Module:
    """A saved mixture with router rows of a deviation; expert `twins + i` is like expert i."""
    torch.manual_seed(0)
    model = moezoo.build(
        moezoo.SwitchConfig(
            vocab_size=61, d_model=WIDTH, d_kv=8, d_ff=24, num_heads=4, num_layers=2,
            num_experts=num_experts, dropout_rate=0.0, capacity="dropless", **config,
        ),
        seed=0,
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("classifier.weight"):
                parameter.normal_(0.0, std)
            elif ".experts." in name and twins:
                like = parameter[: num_experts - twins]
                like = like + noise * like.std() * torch.randn_like(like)
                parameter[twins:] = like
    moezoo.save(model, path)
    return model


def tokens(count: int = 4096) -> Tensor:
    """What a layer reads after a norm of weight 1."""
    x = torch.randn(1, count, WIDTH, generator=torch.Generator().manual_seed(9))
    return x / x.square().mean(-1, keepdim=True).sqrt()


def outputs(model: nn.Module, layer: str = LAYER) -> Tensor:
    with torch.no_grad():
        y, _ = model.get_submodule(layer)(tokens())
    return y[0]


def rescaled(path: Path, factors: list[float]) -> nn.Module:
    """The model with another factor on each expert's `wo` in `LAYER`."""
    model = moezoo.load(path)
    with torch.no_grad():
        wo = model.get_parameter(f"{LAYER}.experts.wo")
        wo.mul_(torch.tensor(factors)[:, None, None])
    return model


def factors(path: Path) -> list[float]:
    with open_checkpoint(path) as checkpoint:
        found: list[float] = checkpoint.description.values["moezoo_provenance"]["wo_factors"][LAYER]
        return found


def test_likes_that_are_sure_of_their_own_tokens_keep_their_scale(tmp_path: Path) -> None:
    before = trained(tmp_path / "a", num_experts=6, std=4.0, twins=3)
    shrink(tmp_path / "a", tmp_path / "b", num_experts=3)
    after = moezoo.load(tmp_path / "b")
    assert min(factors(tmp_path / "b")) > 0.8
    expected, found = outputs(before), outputs(after)
    same = (found * expected).sum(-1) > 0.5 * expected.square().sum(-1)
    ratio = found[same].norm(dim=-1) / expected[same].norm(dim=-1)
    assert float(same.float().mean()) > 0.4 and abs(float(ratio.median()) - 1.0) < 0.1


@pytest.mark.parametrize("method", ["merge", "prune"])
@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("std", [1e-3, 0.05, 0.3, 2.0])
def test_no_output_is_further_away_than_with_the_scale_left_alone(
    std: float, noise: float, method: str, tmp_path: Path
) -> None:
    before = trained(tmp_path / "a", num_experts=8, std=std, twins=4, noise=noise)
    with torch.no_grad(), moezoo.record(before) as tape:
        before(ids(16, 16), decoder_input_ids=ids(16, 16, seed=1))
    trace = traces.of(tape) if method == "prune" else None
    shrink(tmp_path / "a", tmp_path / "b", num_experts=5, method=method, trace=trace)
    expected, chosen = outputs(before), factors(tmp_path / "b")
    error = relative(outputs(moezoo.load(tmp_path / "b")), expected)
    alone = relative(outputs(rescaled(tmp_path / "b", [1.0 / s for s in chosen])), expected)
    assert error <= alone + 1e-3
    if std <= 0.05:  # rows that are nearly equal, whose probabilities rise from 1 / 8 to 1 / 5
        assert error < 0.9 * alone
        if method == "merge":
            assert chosen == pytest.approx([5 / 8] * 5, rel=0.2)


@pytest.mark.parametrize(
    "router",
    [
        "switch",
        {"name": "switch", "weight": "unit"},
        {"name": "top_k", "k": 2},
        {"name": "top_k", "k": 2, "normalize": "none"},
        {"name": "top_k", "k": 2, "softmax": "after"},
    ],
)
@pytest.mark.parametrize("num_experts", [1, 3, 4, 7])
def test_a_fresh_upcycling_shrinks_to_any_number_exactly(
    num_experts: int, router: Any, tmp_path: Path
) -> None:
    source = dense_t5(tmp_path / "t5")
    moezoo.upcycle(source, tmp_path / "up", num_experts=8, router=router)
    if num_experts == 1 and router != "switch" and router["name"] == "top_k":
        with pytest.raises(ConfigError, match="k is out of range"):
            shrink(tmp_path / "up", tmp_path / "few", num_experts=num_experts)
        return
    shrink(tmp_path / "up", tmp_path / "few", num_experts=num_experts)
    moezoo.downcycle(tmp_path / "few", tmp_path / "back")
    expected = moezoo.load(source)
    with torch.no_grad():
        logits = expected(ids(), decoder_input_ids=ids(seed=1)).logits
        for name in ("few", "back"):
            found = moezoo.load(tmp_path / name)(ids(), decoder_input_ids=ids(seed=1)).logits
            assert relative(found, logits) <= 1e-5, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [2, 3, 5])
@pytest.mark.parametrize("std", [0.02, 0.3, 2.0])
def test_what_was_grown_comes_back_in_every_dtype(
    std: float, factor: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = trained(tmp_path / "wide", num_experts=3, std=std).to(dtype)
    moezoo.save(model, tmp_path / "a")
    grow(tmp_path / "a", tmp_path / "large", factor=factor)
    shrink(tmp_path / "large", tmp_path / "small", num_experts=3)
    assert factors(tmp_path / "small") == pytest.approx([1.0 / factor] * 3, rel=0.05)
    before, after = (moezoo.load(tmp_path / n, dtype=torch.float32) for n in ("a", "small"))
    expected, found = outputs(before), outputs(after)
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    # Rounding of the rows alone sends a token on the border of two experts to the other.
    assert float((error > 5 * ROUNDING[dtype]).float().mean()) <= 0.005
    assert float(error.median()) <= ROUNDING[dtype]
    if dtype == torch.float32:
        assert factors(tmp_path / "small") == [1.0 / factor] * 3
        assert after.config.wo_scale == pytest.approx(1.0)


def test_a_trace_with_probabilities_says_how_real_tokens_are_weighed(tmp_path: Path) -> None:
    model = trained(tmp_path / "a", num_experts=4, std=0.02, twins=2)
    rows = model.get_parameter(f"{LAYER}.router.classifier.weight")
    with torch.no_grad(), moezoo.record(model) as tape:  # every token is sure of expert 0
        rows[0] += 3.0
        model.get_parameter("encoder.blocks.1.mlp_norm.weight").fill_(1.0)
        x = tokens(64).abs()
        model.get_submodule(LAYER)(x)
    (routing,) = tape.by_layer[LAYER]
    moezoo.save(model, tmp_path / "sure")
    assert float(routing.probs[:, 0].min()) > 0.9
    other = "decoder.blocks.1.mlp"
    known = traces.Trace({LAYER: (routing,), other: (routing,)})
    shrink(tmp_path / "sure", tmp_path / "b", num_experts=2, trace=known)
    assert max(factors(tmp_path / "b")) > 0.9


def test_256_experts_are_joined_in_seconds(tmp_path: Path) -> None:
    trained(tmp_path / "a", num_experts=256, std=0.3, twins=128, noise=1e-3)
    started = time.monotonic()
    shrink(tmp_path / "a", tmp_path / "b", num_experts=128)
    assert time.monotonic() - started < 20.0
    with open_checkpoint(tmp_path / "b") as checkpoint:
        groups = checkpoint.description.values["moezoo_provenance"]["groups"][LAYER]
    assert sorted(groups) == [[i, i + 128] for i in range(128)]


def plain_groups(distance: Tensor, count: int) -> tuple[tuple[int, ...], ...]:
    groups: list[tuple[int, ...]] = [(expert,) for expert in range(len(distance))]
    while len(groups) > count:
        *_, i, j = min(
            (float(distance[list(one)][:, list(other)].max()), len(one) + len(other), i, j)
            for i, one in enumerate(groups)
            for j, other in enumerate(groups[:i])
        )
        both = tuple(sorted((*groups[i], *groups[j])))
        groups = [group for k, group in enumerate(groups) if k not in (i, j)] + [both]
    return tuple(sorted(groups))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_groups_are_those_of_the_plain_loop(seed: int, ties: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(11, 3, generator=generator, dtype=torch.float64)
    points = points.round() if ties else points
    distance = (points[:, None] - points).square().sum(-1)
    for count in (1, 4, 7, 10):
        assert joined(distance, count) == plain_groups(distance, count)


def test_distances_are_those_of_the_weights_and_twins_have_none(tmp_path: Path) -> None:
    model = trained(tmp_path / "a", num_experts=6, std=0.1, twins=4)
    with open_checkpoint(tmp_path / "a") as checkpoint:
        found = distances(checkpoint, LAYER)
    experts = model.get_submodule(f"{LAYER}.experts")
    flat = torch.cat([p.detach().double().flatten(1) for p in experts.parameters()], 1)
    assert torch.allclose(found, (flat[:, None] - flat).square().sum(-1), atol=1e-8)
    assert found[0, 4] == found[1, 5] == 0.0
