"""Upcycling live models: exact, balanced, reversible, loadable by transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import moezoo
from tests.models.tiny import TINY, source, tiny


def dense(**overrides: Any) -> torch.nn.Module:
    return tiny(num_experts=0, num_layers=4, **overrides)


def relative_error(model: torch.nn.Module, reference: torch.nn.Module) -> float:
    ids, target = source(4, 9), source(4, 8, seed=2)
    with torch.no_grad():
        expected = reference(ids, decoder_input_ids=target).logits
        found = model(ids, decoder_input_ids=target).logits
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("feed_forward_proj", ["relu", "gated-gelu"])
@pytest.mark.parametrize("num_experts", [1, 2, 3, 8])
def test_an_upcycled_model_computes_what_the_dense_one_did(
    num_experts: int, feed_forward_proj: str
) -> None:
    model = dense(feed_forward_proj=feed_forward_proj)
    sparse = moezoo.upcycle(model, num_experts=num_experts)
    assert sparse.config.encoder_sparse == (1, 3)
    assert relative_error(sparse, model) <= 1e-5


@pytest.mark.parametrize(
    "router",
    [
        {"name": "switch", "weight": "unit"},
        {"name": "top_k", "k": 2},
        {"name": "top_k", "k": 2, "normalize": "none"},
        {"name": "top_k", "k": 2, "softmax": "after"},
    ],
)
def test_exactness_holds_for_every_router_whose_factor_is_known(router: dict[str, Any]) -> None:
    model = dense()
    assert relative_error(moezoo.upcycle(model, num_experts=4, router=router), model) <= 1e-5


def test_plain_copy_is_not_exact() -> None:
    model = dense()
    assert relative_error(moezoo.upcycle(model, num_experts=8, preserve="none"), model) > 0.05


def test_tokens_spread_over_all_experts_at_step_zero() -> None:
    sparse = moezoo.upcycle(dense(), num_experts=4)
    with moezoo.record(sparse) as tape:
        sparse(source(32, 16), decoder_input_ids=source(32, 16, seed=1))
    for stats in tape.stats().values():
        assert stats.dead == []
        assert stats.dropped == 0


@pytest.mark.parametrize("num_experts", [2, 8])
@pytest.mark.parametrize("feed_forward_proj", ["relu", "gated-gelu"])
def test_downcycling_gives_the_same_bytes_back(num_experts: int, feed_forward_proj: str) -> None:
    model = dense(feed_forward_proj=feed_forward_proj)
    back = moezoo.downcycle(moezoo.upcycle(model, num_experts=num_experts))
    assert back.config.encoder_sparse == ()
    expected = model.state_dict()
    assert back.state_dict().keys() == expected.keys()
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


ROUTERS: list[Any] = [
    "switch",
    {"name": "switch", "weight": "unit"},
    {"name": "top_k", "k": 2},
    {"name": "top_k", "k": 2, "normalize": "none"},
]


@pytest.mark.parametrize(
    ("feed_forward_proj", "dtype"),
    [("relu", torch.float32), ("gated-gelu", torch.bfloat16), ("relu", torch.float16)],
)
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("preserve", ["exact", "none"])
def test_downcycling_undoes_what_was_applied_and_nothing_else(
    feed_forward_proj: str, preserve: str, router: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = dense(feed_forward_proj=feed_forward_proj).to(dtype)
    sparse = moezoo.upcycle(model, num_experts=8, router=router, preserve=preserve)
    moezoo.save(sparse, tmp_path / "saved")
    moezoo.save(moezoo.load(tmp_path / "saved"), tmp_path / "again")
    expected = model.state_dict()
    for made in (sparse, copy.deepcopy(sparse), moezoo.load(tmp_path / "again")):
        back = moezoo.downcycle(made)
        assert back.config.wo_scale is None and back.config.encoder_sparse == ()
        for name, tensor in back.state_dict().items():
            assert torch.equal(tensor, expected[name]), name
    moezoo.downcycle(tmp_path / "again", tmp_path / "back")
    for name, tensor in moezoo.load(tmp_path / "back").state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_the_factor_goes_to_transformers_and_comes_back() -> None:
    pytest.importorskip("transformers")
    from moezoo.adapters.transformers import from_transformers, to_transformers

    for preserve, factor in (("exact", 4.0), ("none", 1.0)):
        sparse = moezoo.upcycle(dense(), num_experts=4, preserve=preserve)
        assert sparse.config.wo_scale == factor
        assert from_transformers(to_transformers(sparse)).config.wo_scale == factor


def test_a_factor_that_is_none_is_refused() -> None:
    for value in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(moezoo.MoezooError, match="wo_scale is no factor"):
            TINY.replace(wo_scale=value)
    with pytest.raises(moezoo.MoezooError, match="wo_scale has the wrong type"):
        TINY.replace(wo_scale="4")


def test_experts_that_differ_cannot_be_downcycled_silently() -> None:
    sparse = moezoo.upcycle(dense(), num_experts=4, init="noise:0.1")
    with pytest.raises(moezoo.MoezooError, match="experts of encoder.blocks.1.mlp differ"):
        moezoo.downcycle(sparse)


def test_the_source_model_is_left_alone_and_shares_no_memory() -> None:
    model = dense()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sparse = moezoo.upcycle(model, num_experts=2)
    with torch.no_grad():
        for parameter in sparse.parameters():
            parameter.fill_(7.0)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_seed_decides_every_random_number() -> None:
    first, again, other = (
        moezoo.upcycle(dense(), num_experts=4, init="drop:0.5", seed=s).state_dict()
        for s in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    changed = [name for name in first if not torch.equal(first[name], other[name])]
    assert all(".mlp." in name for name in changed)
    assert changed


def test_an_upcycled_transformers_t5_goes_back_as_a_switch_model() -> None:
    transformers = pytest.importorskip("transformers")
    from moezoo.adapters.transformers import to_transformers

    config = transformers.T5Config(
        vocab_size=61, d_model=16, d_kv=4, d_ff=24, num_heads=2, num_layers=4, dropout_rate=0.0
    )
    reference = transformers.T5ForConditionalGeneration(config).eval()
    sparse = to_transformers(moezoo.upcycle(reference, num_experts=8))
    assert type(sparse).__name__ == "SwitchTransformersForConditionalGeneration"
    ids = source(2, 9)
    with torch.no_grad():
        expected = reference(input_ids=ids, decoder_input_ids=ids).logits
        found = sparse(input_ids=ids, decoder_input_ids=ids).logits
    assert (found - expected).norm() / expected.norm() <= 1e-5


def test_what_cannot_be_upcycled_is_refused_with_the_reason() -> None:
    with pytest.raises(moezoo.MoezooError, match="already"):
        moezoo.upcycle(tiny(), num_experts=2)
    with pytest.raises(moezoo.MoezooError, match="not a T5"):
        moezoo.upcycle(torch.nn.Linear(2, 2), num_experts=2)
    with pytest.raises(moezoo.MoezooError, match="needs a target"):
        moezoo.upcycle("somewhere", num_experts=2)
    with pytest.raises(moezoo.MoezooError, match="num_experts"):
        moezoo.upcycle(dense(), num_experts=0)
    with pytest.raises(moezoo.MoezooError, match="sample text"):
        moezoo.upcycle(dense(), num_experts=2, router_init="mean_orthogonal")
    assert TINY.num_experts == 4


def test_layers_may_be_a_list_of_indices() -> None:
    made = moezoo.upcycle(dense(), num_experts=2, layers=[1, 3])
    assert made.config.encoder_sparse == made.config.decoder_sparse == (1, 3)
    with pytest.raises(moezoo.MoezooError, match="a list of indices"):
        moezoo.upcycle(dense(), num_experts=2, layers=3)
