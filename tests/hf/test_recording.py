"""`moezoo.record` reads the routers of transformers' sparse models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import moezoo
from moezoo import capacity, traces
from moezoo.errors import ConfigError, NonFiniteInput

from .sparse_classes import EXPERTS, TOKENS, WIDTH, inputs, names, tiny, tiny_block
from .test_sparse_models import CONFIGS, IDS

MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]])


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def test_the_layers_of_the_classes_that_there_are_can_be_read() -> None:
    x = torch.randn(1, TOKENS, WIDTH)
    read, silent = [], []
    for name in names():
        block = tiny_block(name)
        if block is None:
            continue
        given: list[tuple[Tensor, ...]] = []
        experts = next(m for m in block.modules() if hasattr(m, "is_transposed"))
        handle = experts.register_forward_pre_hook(lambda _, args, to=given: to.append(args[:3]))
        with moezoo.record(block) as tape:
            block(x)
        handle.remove()
        ((routing,),) = tape.by_layer.values()
        pairs = routing.assignment.check()
        _, chosen, weights = given[0]
        assert torch.equal(pairs.expert.view(chosen.t().shape).t(), chosen)
        torch.testing.assert_close(pairs.weight.view(chosen.t().shape).t(), weights.float())
        if routing.logits is None:
            silent.append(name)
            continue
        read.append(name)
        assert routing.logits.shape == (TOKENS, EXPERTS)
        torch.testing.assert_close(routing.probs.sum(-1), torch.ones(TOKENS))
    assert len(read) >= 0.75 * len(names())
    assert {*silent} <= {"zaya.modeling_zaya.ZayaExperts"}  # whose router has a class for no expert


SCORES = {
    "mixtral.modeling_mixtral.MixtralExperts": lambda z: z.softmax(-1),
    "gpt_oss.modeling_gpt_oss.GptOssExperts": lambda z: z.softmax(-1),
    "deepseek_v2.modeling_deepseek_v2.DeepseekV2Experts": lambda z: z.softmax(-1),
    "deepseek_v3.modeling_deepseek_v3.DeepseekV3Experts": lambda z: z.sigmoid(),
    "glm4_moe.modeling_glm4_moe.Glm4MoeExperts": lambda z: z.sigmoid(),
    "minimax_m2.modeling_minimax_m2.MiniMaxM2Experts": lambda z: z.sigmoid(),
}


@pytest.mark.parametrize("name", SCORES)
def test_probabilities_are_of_the_score_that_the_router_takes(name: str) -> None:
    block = tiny_block(name)
    assert block is not None
    with moezoo.record(block) as tape:
        block(torch.randn(1, TOKENS, WIDTH))
    ((routing,),) = tape.by_layer.values()
    score = SCORES[name](routing.logits)
    torch.testing.assert_close(routing.probs, score / score.sum(-1, keepdim=True))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("implementation", ["eager", "moezoo"])
def test_a_tape_has_loads_drops_losses_and_traces(name: str, implementation: str) -> None:
    model = model_of(name)
    model.set_experts_implementation(implementation)
    with moezoo.record(model) as tape:
        out = model(input_ids=IDS, output_router_logits=True)
    assert list(tape.by_layer) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    for stats, logits in zip(tape.stats().values(), out.router_logits, strict=True):
        chosen = logits.topk(2, -1).indices.flatten()
        assert stats.load == torch.bincount(chosen, minlength=4).tolist()
        assert stats.tokens == IDS.numel() and stats.dropped == 0.0
        entropy = torch.special.entr(logits.detach().softmax(-1)).sum(-1).mean()
        assert stats.entropy == pytest.approx(float(entropy), rel=1e-5)
    theirs = load_balancing_loss_func(out.router_logits, 4, 2)
    ours = tape.losses("load_balance")
    assert torch.isfinite(theirs) and all(v > 0 for v in ours.values())
    tape.loss({"load_balance": 0.1, "z": 0.01}).backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("layers.1.mlp" in n and ("gate" in n or "router" in n) for n in trained)
    trace = traces.of(tape)
    policy = capacity.build({"name": "first_come", "factor": 1.0, "order": "token"})
    assert all(0.0 <= share < 1.0 for share in traces.dropped(trace, policy).values())
    assert any(traces.dropped(trace, policy).values())
    tape.adapt()  # which is the model's own business


def test_saved_traces_come_back(tmp_path: Path) -> None:
    model = model_of("mixtral")
    with torch.no_grad(), moezoo.record(model) as tape:
        model(input_ids=IDS)
    trace = traces.of(tape)
    trace.save(tmp_path / "trace.safetensors")
    found = traces.compare(trace, traces.load(tmp_path / "trace.safetensors"))
    assert len(found) == 2


def test_the_configured_loss_is_that_of_the_config() -> None:
    model = model_of("mixtral")
    with moezoo.record(model) as tape:
        model(input_ids=IDS)
    wanted = model.config.router_aux_loss_coef
    torch.testing.assert_close(tape.loss(), tape.loss({"load_balance": wanted}))


def test_padding_is_in_no_number_with_and_without_a_cache() -> None:
    model = model_of("qwen3_moe")
    with torch.no_grad(), moezoo.record(model) as tape:
        model(input_ids=IDS, attention_mask=MASK)
    (routing,) = tape.by_layer["model.layers.0.mlp"]
    assert torch.equal(routing.real, MASK.bool().flatten())
    stats = tape.stats()["model.layers.0.mlp"]
    assert stats.tokens == int(MASK.sum()) and sum(stats.load) == 2 * int(MASK.sum())
    options = {"max_new_tokens": 3, "do_sample": False}
    for cache in ("dynamic", "static"):
        with torch.no_grad(), moezoo.record(model) as tape:
            model.generate(IDS, attention_mask=MASK, cache_implementation=cache, **options)
        first, *others = tape.by_layer["model.layers.0.mlp"]
        assert torch.equal(first.real, MASK.bool().flatten())
        assert [r.assignment.num_tokens for r in others] == [2, 2]
        assert all(r.real.all() for r in others)


class Around(torch.nn.Module):
    """A training step of one's own, which has neither a config nor a mask."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner = model

    def forward(self, batch: dict[str, Tensor]) -> Any:
        return self.inner(**batch)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
@pytest.mark.parametrize("way", ["own", "parallel", "peft", "peft generates", "peft's experts"])
def test_a_wrapper_hides_neither_padding_nor_the_configured_loss(
    way: str, dtype: torch.dtype
) -> None:
    model: Any = model_of("mixtral")
    batch = {"input_ids": IDS, "attention_mask": MASK.to(dtype)}
    if way == "own":
        model = Around(model)
    elif way == "parallel":
        model = torch.nn.DataParallel(model)
    else:
        own = ["experts.gate_up_proj", "experts.down_proj"] if "experts" in way else None
        lora = peft.LoraConfig(
            r=2, target_modules=["q_proj"], target_parameters=own, task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(model, lora)
    with moezoo.record(model) as tape:
        if way == "own":
            model(batch)
        elif way == "peft generates":
            model.generate(**batch, max_new_tokens=1, do_sample=False)
        else:
            model(**batch)
    (first, *_), _ = tape.by_layer.values()
    assert torch.equal(first.real, MASK.bool().flatten())
    assert all(name.endswith(".mlp") for name in tape.by_layer)
    with torch.no_grad():
        wanted = CONFIGS["mixtral"].router_aux_loss_coef
        torch.testing.assert_close(tape.loss(), tape.loss({"load_balance": wanted}))


def test_experts_that_see_some_of_the_tokens_are_told_of_no_padding() -> None:
    model = model_of("mixtral")  # as those of text and of pictures in ERNIE-VL
    block = model.model.layers[0].mlp
    plain = block.forward
    block.forward = lambda h: torch.cat([plain(h[:, :4].contiguous()), h[:, 4:]], 1)
    with torch.no_grad(), moezoo.record(model) as tape:
        model(input_ids=IDS, attention_mask=MASK)
    first, second = (calls[0].real for calls in tape.by_layer.values())
    assert first is None and torch.equal(second, MASK.bool().flatten())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_router_has_the_sizes_of_its_model(name: str) -> None:
    model = model_of(name)
    with torch.no_grad(), moezoo.record(model) as tape:
        model(input_ids=IDS)
    for layer in tape.layers.values():
        router = layer.router
        assert (router.d_model, router.num_experts, router.choices) == (16, 4, 2)


def test_experts_are_called_with_words_too() -> None:
    experts: Any = tiny("mixtral.modeling_mixtral.MixtralExperts")
    experts.config._experts_implementation = "moezoo"
    x, chosen, weights = inputs()
    with torch.no_grad(), moezoo.record(experts) as tape:
        experts(x, top_k_weights=weights, top_k_index=chosen)
    ((routing,),) = tape.by_layer.values()
    assert torch.equal(routing.assignment.expert.view(chosen.t().shape).t(), chosen)


def test_two_kinds_of_experts_side_by_side_are_both_seen() -> None:
    both: Any = torch.nn.ModuleDict()
    for kind in ("text", "pictures"):
        both[kind] = tiny("mixtral.modeling_mixtral.MixtralExperts")
        both[kind].config._experts_implementation = "moezoo"
    with torch.no_grad(), moezoo.record(torch.nn.ModuleDict({"mlp": both})) as tape:
        both["text"](*inputs())
        both["pictures"](*(t[:4] for t in inputs()))
    assert [s.tokens for s in tape.stats().values()] == [TOKENS, 4]
    assert list(tape.by_layer) == ["mlp.text", "mlp.pictures"]


def test_a_token_with_one_choice_does_not_tell_the_score_of_later_ones() -> None:
    block: Any = tiny_block("deepseek_v3.modeling_deepseek_v3.DeepseekV3Experts")
    for part in block.modules():
        vars(part).update(
            {k: v for k, v in (("top_k", 1), ("norm_topk_prob", False)) if k in vars(part)}
        )
    with torch.no_grad(), moezoo.record(block) as tape:
        block(torch.randn(1, 1, WIDTH))
        block(torch.randn(1, TOKENS, WIDTH))
    ((first, later),) = tape.by_layer.values()
    assert first.assignment.choices == 1
    score = later.logits.sigmoid()
    torch.testing.assert_close(later.probs, score / score.sum(-1, keepdim=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_block_is_recorded_once(reentrant: bool) -> None:
    model = model_of("mixtral").train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with moezoo.record(model) as tape:
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert [len(calls) for calls in tape.by_layer.values()] == [1, 1]
    if reentrant:
        with pytest.raises(moezoo.MoezooError, match="has no gradient"):
            tape.loss({"load_balance": 1.0})


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_of_recomputed_blocks_have_the_gradient_of_others(name: str) -> None:
    model, found = model_of(name).train(), []
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        with moezoo.record(model) as tape:
            loss = model(input_ids=IDS, attention_mask=MASK, labels=IDS).loss
        (loss + tape.loss({"load_balance": 0.3, "z": 0.1})).backward()  # when the hooks are gone
        found.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for key, grad in found[0].items():
        torch.testing.assert_close(found[1][key], grad, atol=1e-6, rtol=1e-5, msg=key)


def test_hooks_go_with_the_block_and_bad_input_is_named() -> None:
    model = model_of("mixtral")
    with moezoo.record(model) as tape:
        model(input_ids=IDS)
    model(input_ids=IDS)
    assert [len(calls) for calls in tape.by_layer.values()] == [1, 1]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        model.model.embed_tokens.weight[int(IDS[0, 3])] = float("nan")
    with pytest.raises(NonFiniteInput, match="NaN"), moezoo.record(model, checked=True):
        model(input_ids=IDS)
    dense = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=8,
        )
    )  # fmt: skip
    with pytest.raises(ConfigError, match="no MoE layer"), moezoo.record(dense):
        pass
