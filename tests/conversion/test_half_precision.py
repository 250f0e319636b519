"""What a dense T5 computes in float16, its mixtures compute in it too, to the end of its range."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moezoo
from moezoo.adapters.transformers import to_transformers
from moezoo.adapters.upcycle.export import export
from moezoo.adapters.upcycle.grow import grow
from moezoo.adapters.upcycle.shrink import shrink
from moezoo.adapters.verify import verify
from moezoo.errors import ConfigError, NonFiniteWeights
from moezoo.experts import StackedExperts
from tests.conversion.dense import ids, relative

# Weighs by the probability, so that an expert gives E times what the dense layer does.
PLAIN: dict[str, Any] = {"router": "switch", "router_init": "normal"}
REACH = 30_000.0  # of a feed-forward network's results; float16 ends at 65,504
ROUNDING = 2e-3


def reaching(feed_forward_proj: str = "relu") -> nn.Module:
    """A dense T5 whose second feed-forward networks give up to `REACH`."""
    config = moezoo.SwitchConfig(
        vocab_size=61, d_model=32, d_kv=8, d_ff=64, num_heads=4, num_layers=2, dropout_rate=0.0,
        feed_forward_proj=feed_forward_proj,
    )  # fmt: skip
    model = moezoo.build(config, seed=0)
    with torch.no_grad():
        for stack in (model.encoder, model.decoder):
            mlp = stack.blocks[1].mlp
            (mlp.wi_1 if mlp.gated else mlp.wi).weight.mul_(40.0)
            mlp.wo.weight.mul_(REACH / highest(model, mlp))
    return model


def highest(model: nn.Module, mlp: nn.Module) -> float:
    """The largest result of a dense MLP in one run of the model."""
    seen: list[Tensor] = []
    handle = mlp.register_forward_hook(lambda _module, _inputs, y: seen.append(y))
    logits(model)
    handle.remove()
    return float(seen[0].abs().max())


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(ids(), decoder_input_ids=ids(seed=1)).logits.float()


def loaded(path: Path) -> Tensor:
    model = moezoo.load(path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    return logits(model)


@pytest.mark.parametrize("feed_forward_proj", ["relu", "gated-gelu"])
@pytest.mark.parametrize("num_experts", [3, 8, 64])
def test_a_live_mixture_in_float16_computes_what_the_dense_model_does(
    num_experts: int, feed_forward_proj: str
) -> None:
    dense = reaching(feed_forward_proj)
    before = moezoo.upcycle(dense, **PLAIN, num_experts=num_experts).half()
    after = moezoo.upcycle(copy.deepcopy(dense).half(), **PLAIN, num_experts=num_experts)
    expected = logits(dense.half())
    assert bool(expected.isfinite().all())
    for sparse in (before, after):
        assert relative(logits(sparse), expected) <= ROUNDING
        ours = sparse.generate(ids()[:1], max_new_tokens=4, num_beams=1)
        assert torch.equal(ours, dense.generate(ids()[:1], max_new_tokens=4, num_beams=1))


def test_an_experts_result_alone_would_leave_the_range() -> None:
    sparse = moezoo.upcycle(reaching(), **PLAIN, num_experts=8).half()
    experts = sparse.encoder.blocks[1].mlp.experts
    seen: list[tuple[Tensor, ...]] = []
    experts.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs))
    logits(sparse)
    slots, counts, weights = seen[0]
    with torch.no_grad():
        assert bool(experts(slots, counts).isinf().any())
        weighted = experts(slots, counts, weights)
    assert REACH / 2 < float(weighted.abs().max()) < REACH * 2


@pytest.mark.parametrize("feed_forward_proj", ["relu", "gated-gelu"])
@pytest.mark.parametrize("num_experts", [8, 64])
def test_every_way_to_a_checkpoint_in_float16_keeps_the_function(
    num_experts: int, feed_forward_proj: str, tmp_path: Path
) -> None:
    dense = reaching(feed_forward_proj)
    moezoo.save(dense, tmp_path / "t5")
    moezoo.save(copy.deepcopy(dense).half(), tmp_path / "narrow")
    expected = logits(dense.half())
    up, wide = tmp_path / "up", tmp_path / "wide"
    moezoo.upcycle(tmp_path / "t5", up, **PLAIN, num_experts=num_experts, dtype="float16")
    moezoo.upcycle(tmp_path / "narrow", tmp_path / "as stored", **PLAIN, num_experts=num_experts)
    moezoo.upcycle(tmp_path / "t5", wide, **PLAIN, num_experts=num_experts)
    export(wide, tmp_path / "exported", dtype="float16")
    grow(up, tmp_path / "grown", factor=4)
    shrink(tmp_path / "grown", tmp_path / "shrunk", num_experts=3)
    moezoo.save(moezoo.load(wide).half(), tmp_path / "saved")
    for name in ("up", "as stored", "exported", "grown", "shrunk", "saved"):
        assert relative(loaded(tmp_path / name), expected) <= ROUNDING, name
    for name in ("up", "as stored", "exported"):
        found = verify(tmp_path / name, tmp_path / ("narrow" if name == "as stored" else "t5"))
        assert found.passed, found.line


def test_experts_in_float16_train_and_run_under_autocast() -> None:
    dense = reaching()
    sparse = moezoo.upcycle(dense, **PLAIN, num_experts=8)
    expected = logits(dense.half())
    with torch.autocast("cpu", dtype=torch.float16):
        assert relative(logits(sparse), expected) <= 5 * ROUNDING
    sparse = sparse.half().train()
    mlp = sparse.encoder.blocks[1].mlp
    x = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(0)).half()
    mlp(x)[0].float().mean().backward()
    for name, parameter in mlp.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
        assert bool(parameter.grad.any()), name


def test_int8_experts_keep_the_range_too() -> None:
    dense = reaching()
    sparse = moezoo.upcycle(dense, **PLAIN, num_experts=8)
    moezoo.quantize(sparse)
    expected = logits(dense.half())
    assert relative(logits(sparse.half()), expected) <= 0.1


def test_switchs_layout_in_float16_is_refused_with_the_figure(tmp_path: Path) -> None:
    dense = reaching()
    moezoo.save(dense, tmp_path / "t5")
    moezoo.upcycle(tmp_path / "t5", tmp_path / "up", **PLAIN, num_experts=8)
    figure = r"more than 65,504 before the gate: above 8,188 of the dense layer.*bfloat16"
    steps: dict[str, Any] = {
        "upcycle": lambda out: moezoo.upcycle(
            tmp_path / "t5", out, **PLAIN, num_experts=8, dtype="float16", layout="huggingface"
        ),
        "export": lambda out: export(
            tmp_path / "up", out, dtype="float16", layout="huggingface"
        ),
        "save": lambda out: moezoo.save(
            moezoo.load(tmp_path / "up").half(), out, layout="huggingface"
        ),
        "live": lambda out: to_transformers(moezoo.load(tmp_path / "up").half()),
    }  # fmt: skip
    for name, step in steps.items():
        with pytest.raises(ConfigError, match=figure):
            step(tmp_path / name)
        assert not (tmp_path / name).exists()
    for options in ({"dtype": "bfloat16"}, {"dtype": "float16", "preserve": "none"}):
        report = moezoo.upcycle(
            tmp_path / "t5", tmp_path / str(options), **PLAIN, num_experts=8, **options
        )  # fmt: skip
        assert report.plan.layout == "Hugging Face Switch"
    report = moezoo.upcycle(
        tmp_path / "t5", tmp_path / "own", **PLAIN, num_experts=8, dtype="float16"
    )
    assert report.plan.layout.startswith("moezoo, because in float16 transformers overflows")


def test_transformers_does_overflow_there(tmp_path: Path) -> None:
    dense = reaching()
    theirs = to_transformers(moezoo.upcycle(dense, **PLAIN, num_experts=8))
    expected = logits(dense)
    assert relative(logits(theirs), expected) <= 1e-5
    assert relative(logits(theirs.bfloat16()), expected) <= 0.1
    theirs = to_transformers(moezoo.upcycle(dense, **PLAIN, num_experts=8)).half()
    found = logits(theirs)
    assert not bool(found.isfinite().all()) or relative(found, expected) > 0.1


def test_growing_a_trained_mixture_in_float16_leaves_switchs_layout(tmp_path: Path) -> None:
    model = moezoo.build(reaching().config, num_experts=2, seed=0, dtype=torch.float16)
    moezoo.save(model, tmp_path / "trained")
    assert "switch_transformers" in (tmp_path / "trained/config.json").read_text()
    grow(tmp_path / "trained", tmp_path / "grown")
    assert '"model_type": "moezoo"' in (tmp_path / "grown/config.json").read_text()


@pytest.mark.parametrize("level", [3, 4])
def test_verification_reaches_the_range(
    level: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moezoo.save(reaching(), tmp_path / "t5")
    moezoo.upcycle(tmp_path / "t5", tmp_path / "up", **PLAIN, num_experts=8, dtype="float16")
    assert verify(tmp_path / "up", tmp_path / "t5", levels=[level]).passed
    monkeypatch.setattr(StackedExperts, "takes_weights", False)
    assert not verify(tmp_path / "up", tmp_path / "t5", levels=[level]).passed


@pytest.mark.parametrize("feed_forward_proj", ["relu", "gated-gelu"])
def test_a_mild_layer_is_verified_to_its_range_too(
    feed_forward_proj: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = moezoo.build(reaching().config, feed_forward_proj=feed_forward_proj, seed=0)
    moezoo.save(model, tmp_path / "t5")
    moezoo.upcycle(tmp_path / "t5", tmp_path / "up", **PLAIN, num_experts=8, dtype="float16")
    assert verify(tmp_path / "up", tmp_path / "t5", levels=[3]).passed
    monkeypatch.setattr(StackedExperts, "takes_weights", False)
    assert not verify(tmp_path / "up", tmp_path / "t5", levels=[3]).passed


def test_a_live_factor_that_no_weight_survives_is_refused() -> None:
    dense = reaching()
    with torch.no_grad():
        dense.encoder.blocks[1].mlp.wo.weight[0, 0] = 20_000.0
    for model, dtype in ((copy.deepcopy(dense).half(), None), (dense, "float16")):
        with pytest.raises(NonFiniteWeights, match="leaves the range of (float16|F16).*bfloat16"):
            moezoo.upcycle(model, **PLAIN, num_experts=8, dtype=dtype)
