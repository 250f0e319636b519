"""int8 inference: close, smaller, and never silent about what it left alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import moezoo
from moezoo.errors import ConfigError
from moezoo.experts import StackedExperts
from moezoo.ops.int8 import int8_linear, rounded_rows
from moezoo.quantization import Int8Experts, Int8Linear, relative_error
from tests.models.tiny import TINY, source


@given(st.integers(0, 9), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31))
def test_a_rounded_product_is_close_to_the_exact_one(n: int, k: int, m: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, k, generator=generator)
    weight = torch.randn(m, k, generator=generator)
    codes, scale = rounded_rows(weight)
    found = int8_linear(x, codes, scale[:, 0])
    # Half a step per factor: |x| and |w| are at most 127 steps of their row.
    step_x, step_w = x.abs().amax(1, keepdim=True) / 254, weight.abs().amax(1) / 254
    bound = step_x * weight.abs().sum(1) + x.abs().sum(1, keepdim=True) * step_w
    limit = bound + k * step_x * step_w + 1e-4
    assert ((found - x @ weight.t()).abs() <= limit).all()


def test_a_row_is_rounded_by_itself_and_nothing_bad_looks_finite() -> None:
    weight = torch.randn(5, 8)
    codes, scale = rounded_rows(weight)
    x = torch.randn(4, 8)
    alone = int8_linear(x[:1], codes, scale[:, 0])
    x[1] *= 1e6
    x[2] = float("nan")
    x[3] = 0.0
    y = int8_linear(x, codes, scale[:, 0])
    assert torch.equal(y[:1], alone)
    assert y[2].isnan().all()
    assert not y[3].any()


@pytest.mark.parametrize("activation", ["relu", "gated-gelu"])
def test_experts_keep_their_contract(activation: str) -> None:
    torch.manual_seed(0)
    experts = StackedExperts(16, 32, 3, activation=activation)
    slots, counts = torch.randn(9, 16), torch.tensor([4, 0, 3])
    with torch.no_grad():
        expected = experts(slots, counts)
        found = Int8Experts(experts)(slots, counts)
    assert relative_error(expected, found) < 0.03
    assert not found[7:].any()


def test_a_model_stays_close_in_a_third_of_its_memory(tmp_path: Path) -> None:
    model = moezoo.build(TINY.replace(d_model=64, d_ff=256), seed=0).eval()
    ids, target = source(2, 9), source(2, 5, seed=1)
    with torch.no_grad():
        expected = model(ids, decoder_input_ids=target).logits
        done = moezoo.quantize(model)
        found = model(ids, decoder_input_ids=target)
    assert 0.0 < relative_error(expected, found.logits) < 0.05
    assert done.bytes_after < 0.45 * done.bytes_before
    assert not model.training
    assert "lm_head" in done.quantized
    assert model.generate(ids, max_new_tokens=3).shape[0] == 2
    with pytest.raises(ConfigError, match="quantised model cannot be saved"):
        moezoo.save(model, tmp_path / "model")
    with pytest.raises(ConfigError, match="quantised already"):
        moezoo.quantize(model)


def test_every_parameter_is_either_quantised_or_named_with_its_reason() -> None:
    model = moezoo.build(TINY, seed=0)
    before = {name for name, _ in model.named_parameters()}
    done = moezoo.quantize(model)
    gone = before - {name for name, _ in model.named_parameters()}
    assert all(any(name.startswith(q) for q in done.quantized) for name in gone)
    assert before - gone == set(done.skipped)
    routers = {name for name in before if ".router." in name}
    assert routers
    assert all(done.skipped[name] == "routers decide in float32" for name in routers)
    for reason in set(done.skipped.values()):
        assert reason in str(done)


def test_layers_in_models_of_others_are_quantised_and_unknown_ones_named() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.eye(8))
            self.linear = nn.Linear(8, 8)
            self.twin = self.linear
            self.sparse = moezoo.SparseMLP(8, 16, 4, experts="lora")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.twin(self.sparse(self.linear(x @ self.matrix)))

    torch.manual_seed(0)
    model, x = Own().eval(), torch.randn(3, 8)
    with torch.no_grad():
        expected = model(x)
        done = moezoo.quantize(model)
        assert relative_error(expected, model(x)) < 0.05
    assert isinstance(model.linear, Int8Linear) and model.twin is model.linear
    assert done.skipped["matrix"] == "Own is not known here"
    assert any("LoraExperts uses" in reason for reason in done.skipped.values())


@pytest.mark.parametrize("name", moezoo.experts.names())
def test_every_container_works_quantised_or_as_it_was(name: str) -> None:
    torch.manual_seed(0)
    sparse, x = moezoo.SparseMLP(16, 32, 4, experts=name).eval(), torch.randn(40, 16)
    model = nn.Sequential(sparse, nn.Linear(16, 16))
    with torch.no_grad():
        expected = model(x)
        done = moezoo.quantize(model)
        assert relative_error(expected, model(x)) < 0.05
    left = {n for n, part in model.named_modules() if isinstance(part, nn.Linear)}
    assert {f"{n}.weight" for n in left} <= set(done.skipped), "what stays has its reason"


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(ConfigError, match="unknown dtype.*int8"):
        moezoo.quantize(nn.Linear(2, 2), "int4")
    with pytest.raises(ConfigError, match="Linear holds no linear map"):
        moezoo.quantize(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="for the CPU"):
        moezoo.quantize(nn.Sequential(nn.Linear(2, 2, device="meta")))
    model = nn.Sequential(nn.Linear(2, 2))
    moezoo.quantize(model)
    with pytest.raises(ConfigError, match="do not train"):
        model(torch.randn(1, 2, requires_grad=True))
