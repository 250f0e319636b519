"""`experts_implementation="moezoo"` computes what eager computes, for every class there is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moezoo.adapters.hf  # noqa: F401  (registers "moezoo")
from moezoo.adapters.hf import experts
from moezoo.errors import ConfigError

from .sparse_classes import EXPERTS, called, inputs, names, tiny

NAMES = names()
MUSE = "muse_spark.modeling_muse_spark.MuseSparkExperts"
# One of each: concatenated, transposed with biases, interleaved too, without a gate, normed.
UNLIKE = (
    "mixtral.modeling_mixtral.MixtralExperts",
    "aria.modeling_aria.AriaExperts",
    "openai_privacy_filter.modeling_openai_privacy_filter.OpenAIPrivacyFilterExperts",
    "gpt_oss.modeling_gpt_oss.GptOssExperts",
    "nemotron_h.modeling_nemotron_h.NemotronHExperts",
    *({MUSE} & {*NAMES}),  # of 5.2x
)


def outcome(module: nn.Module, implementation: str, *given: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of tokens, weights and every parameter."""
    x, chosen, weights = given
    leaves = [x.detach().requires_grad_(), weights.detach().requires_grad_()]
    y = called(module, implementation, leaves[0], chosen, leaves[1])
    named = {"x": leaves[0], "weights": leaves[1], **dict(module.named_parameters())}
    toward = torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype)
    grads = torch.autograd.grad(y, list(named.values()), toward)
    return {"y": y.detach(), **dict(zip(named, grads, strict=True))}


def assert_agree(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        gap = (found[name].double() - value.double()).abs().max()
        assert gap <= tolerance * value.double().abs().max(), name


def test_the_classes_are_found() -> None:
    assert len(NAMES) > 50
    assert {
        "mixtral.modeling_mixtral.MixtralExperts",
        "gpt_oss.modeling_gpt_oss.GptOssExperts",
    } <= {*NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_every_class_has_the_values_and_gradients_of_eager(name: str) -> None:
    module = tiny(name)
    given = inputs()
    expected = outcome(module, "eager", *given)
    assert_agree(outcome(module, "moezoo", *given), expected, 1e-5)
    with torch.no_grad():
        y = called(module, "moezoo", *given)
        alone = called(module, "moezoo", *(t[:1] for t in given))
    torch.testing.assert_close(y, expected["y"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alone, expected["y"][:1], atol=1e-5, rtol=1e-5)
    assert experts._is_pure(module) == (name != MUSE)  # whose results are normed


@pytest.mark.parametrize("name", UNLIKE)
def test_bfloat16_is_as_near_to_the_truth_as_eager(name: str) -> None:
    given = inputs()
    module = tiny(name)
    truth = outcome(module, "eager", *given)
    half = [t.bfloat16() if t.is_floating_point() else t for t in given]
    module.bfloat16()
    theirs, ours = outcome(module, "eager", *half), outcome(module, "moezoo", *half)
    for key, value in truth.items():
        size = value.abs().max()
        gap, allowed = (ours[key] - value).abs().max(), (theirs[key] - value).abs().max()
        assert ours[key].dtype == torch.bfloat16
        assert gap <= 2.0 * allowed + 2**-7 * size, key


@pytest.mark.parametrize("name", UNLIKE)
@pytest.mark.parametrize("tokens", [1, 9, 40])
def test_experts_of_other_devices_add_nothing(name: str, tokens: int) -> None:
    module = tiny(name)
    x, chosen, weights = (t.repeat(5, 1)[:tokens] for t in inputs())
    elsewhere = (torch.arange(chosen.numel()).view(chosen.shape) % 4) == 0
    weights = weights.masked_fill(elsewhere, 0.0)  # as expert parallelism hands them over
    expected = outcome(module, "eager", x, chosen, weights)
    expected["weights"].masked_fill_(elsewhere, 0.0)  # nor is the router told anything of them
    module._is_expert_parallel = True
    found = outcome(module, "moezoo", x, chosen.masked_fill(elsewhere, EXPERTS), weights)
    assert_agree(found, expected, 1e-5)
    nowhere = called(module, "moezoo", x, torch.full_like(chosen, EXPERTS), 0.0 * weights)
    assert not nowhere.any()


@pytest.mark.parametrize("name", [UNLIKE[0], UNLIKE[3], *UNLIKE[5:]])
def test_they_compile_whole_for_any_number_of_tokens(name: str) -> None:
    torch.compiler.reset()  # all classes share one forward, and its limit of recompilations
    module: Any = tiny(name)
    module.config._experts_implementation = "moezoo"
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for x, chosen, weights in (inputs(), [torch.cat([t, t]) for t in inputs(seed=1)]):
        x.requires_grad_()
        found, expected = compiled(x, chosen, weights), module(x, chosen, weights)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        wanted = torch.autograd.grad(expected.sum(), x)
        torch.testing.assert_close(torch.autograd.grad(found.sum(), x), wanted)


class Drawn(nn.Module):
    """An activation that no one can compute twice."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5)


class Learned(nn.Module):
    """An activation that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        return self.slope * x.sigmoid()


def test_an_activation_that_draws_is_called_once() -> None:
    module: Any = tiny("mixtral.modeling_mixtral.MixtralExperts")
    x, chosen, weights = inputs()
    module.act_fn = Drawn()
    x.requires_grad_()
    torch.manual_seed(3)
    y = called(module, "moezoo", x, chosen, weights)
    (grad,) = torch.autograd.grad(y.sum(), x)
    step = 1e-3 * torch.randn_like(x)  # silu aside, the layer is a square of x between draws
    values = []
    for sign in (-1, 1):
        torch.manual_seed(3)
        values.append(called(module, "moezoo", x.detach() + sign * step, chosen, weights).sum())
    torch.testing.assert_close(
        (values[1] - values[0]) / 2, (grad * step).sum(), atol=1e-3, rtol=1e-2
    )


def test_an_activation_with_parameters_trains() -> None:
    module: Any = tiny("mixtral.modeling_mixtral.MixtralExperts")
    module.act_fn = Learned()
    given = inputs()
    assert_agree(outcome(module, "moezoo", *given), outcome(module, "eager", *given), 1e-5)


def test_an_activation_that_is_hooked_is_called() -> None:
    module: Any = tiny("mixtral.modeling_mixtral.MixtralExperts")
    given = inputs()
    with torch.no_grad():
        plain = called(module, "moezoo", *given)
        module.act_fn.register_forward_hook(lambda act, args, out: 2.0 * out)
        torch.testing.assert_close(called(module, "moezoo", *given), 2.0 * plain)


def test_a_gate_of_ones_own_is_followed() -> None:
    module: Any = tiny("mixtral.modeling_mixtral.MixtralExperts")
    given = inputs()
    module._apply_gate = lambda both: torch.tanh(both[:, ::2]) - both[:, 1::2]
    assert not experts._is_pure(module)
    theirs = outcome(module, "grouped_mm", *given)
    assert_agree(outcome(module, "moezoo", *given), theirs, 1e-5)


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_weights_that_have_to_be_decoded_are_refused(name: str, dtype: torch.dtype) -> None:
    module: Any = tiny("mixtral.modeling_mixtral.MixtralExperts")
    setattr(module, name, nn.Parameter(getattr(module, name).to(dtype), requires_grad=False))
    with pytest.raises(ConfigError, match=f"{dtype}, which moezoo does not decode") as refusal:
        called(module, "moezoo", *inputs())
    assert refusal.value.field == name
