"""Whole sparse models of transformers with `experts_implementation="moezoo"`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

import moezoo
import moezoo.adapters.hf  # registers "moezoo"
from moezoo.adapters.hf import experts

SMALL = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "eos_token_id": 59,
    "bos_token_id": 1,
}
CONFIGS = {
    "mixtral": transformers.MixtralConfig(**SMALL),
    "gpt_oss": transformers.GptOssConfig(**SMALL, head_dim=8),
    "qwen3_moe": transformers.Qwen3MoeConfig(
        **SMALL, moe_intermediate_size=12, num_experts=4, head_dim=8, norm_topk_prob=True
    ),
}
IDS = torch.randint(2, 58, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.3)
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    return path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens moezoo was called with, call by call."""
    seen: list[int] = []
    plain = experts.routed_mlp

    def counting(x: Tensor, *rest: Any) -> Tensor:
        seen.append(x.shape[0])
        return plain(x, *rest)

    monkeypatch.setattr(experts, "routed_mlp", counting)
    return seen


def load(folder: Path, implementation: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation=implementation)


def gradients(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    out = model(IDS, labels=IDS, output_router_logits=False)
    out.loss.backward()
    return out.logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, atol=1e-5, rtol=1e-4, msg=name)


def test_from_pretrained_takes_the_word(folder: Path, calls: list[int]) -> None:
    eager, ours = load(folder, "eager"), load(folder, "moezoo")
    (wanted, expected), (found, grads) = gradients(eager), gradients(ours)
    assert calls == [IDS.numel()] * 2
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert_equal(grads, expected)


def test_generate_finds_the_same_tokens(folder: Path, calls: list[int]) -> None:
    eager, ours = load(folder, "eager"), load(folder, "moezoo")
    options = {"max_new_tokens": 6, "do_sample": False}
    for beams in (1, 2):
        expected = eager.generate(IDS, num_beams=beams, **options)
        assert torch.equal(ours.generate(IDS, num_beams=beams, **options), expected)
    assert min(calls) == 2  # a token for each row


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_blocks_have_the_same_gradients(folder: Path, reentrant: bool) -> None:
    model = load(folder, "moezoo").train()
    _, expected = gradients(model)
    expected = {name: grad.clone() for name, grad in expected.items()}
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_equal(gradients(model)[1], expected)


def test_lora_on_experts_trains_as_with_eager(folder: Path, calls: list[int]) -> None:
    found = []
    for implementation in ("eager", "moezoo"):
        torch.manual_seed(0)
        config = peft.LoraConfig(
            r=2,
            target_modules=["q_proj"],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
            init_lora_weights=False,
        )
        found.append(gradients(peft.get_peft_model(load(folder, implementation), config)))
    assert calls
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-4, rtol=1e-4)
    assert all("lora_" in name for name in found[0][1])
    assert_equal(found[1][1], found[0][1])


def test_it_may_be_set_later(folder: Path, calls: list[int]) -> None:
    model = load(folder, "eager")
    model.set_experts_implementation("moezoo")
    model(IDS)
    assert len(calls) == 2


def test_router_losses_are_differentiated_by_torch_func(folder: Path) -> None:
    model = load(folder, "moezoo")
    ids = torch.randint(2, 50, (2, 6))

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        with moezoo.record(model) as tape:
            out = torch.func.functional_call(model, parameters, (ids,), {"labels": ids})
        total: Tensor = out.loss + tape.loss({"load_balance": 0.1, "z": 0.01})
        return total

    own = {name: parameter.detach() for name, parameter in model.named_parameters()}
    found = torch.func.grad(loss)(own)
    model.zero_grad()
    loss(dict(model.named_parameters())).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)
