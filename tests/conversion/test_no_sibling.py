"""What docs/stacks.md says of dense decoders without a row, held to the classes of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.glm.modeling_glm import rotate_half as in_pairs
from transformers.models.glm4_moe.modeling_glm4_moe import rotate_half as in_halves
from transformers.models.ministral3.modeling_ministral3 import get_llama_4_attn_scale

from moezoo.adapters.families.sparse_decoders import SPARSE
from tests.conversion.decoders import SIZES, ids, relative

_OPTIONS: dict[str, dict[str, Any]] = {
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "minicpm3": {
        "q_lora_rank": 12,
        "kv_lora_rank": 10,
        "qk_rope_head_dim": 4,
        "v_head_dim": 5,
        "qk_nope_head_dim": 6,
        "num_key_value_heads": 4,
        "head_dim": 4,
    },
}


def made(model_type: str, **options: Any) -> nn.Module:
    """A tiny model of random weights, norms among them."""
    own = CONFIG_MAPPING[model_type]().to_dict()
    sizes = {**SIZES, "head_dim": 8} if "head_dim" in own else SIZES
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, **{**sizes, **_OPTIONS.get(model_type, {}), **options}
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def first_layer(model: nn.Module) -> nn.Module:
    layers = next(m for n, m in model.named_modules() if n.endswith("layers"))
    return next(iter(layers.children()))


@pytest.mark.parametrize(
    "model_type", ["apertus", "arcee", "jais2", "nemotron", "phi", "starcoder2"]
)
def test_an_mlp_has_no_gate(model_type: str) -> None:
    mlp: Any = first_layer(made(model_type)).mlp
    assert sum(parameter.dim() == 2 for parameter in mlp.parameters()) == 2


@pytest.mark.parametrize("model_type", ["gemma", "gemma2", "gemma3_text", "vaultgemma"])
def test_a_norm_weighs_by_one_and_its_weight(model_type: str) -> None:
    """In half precision, 1 + w is no weight that could be written."""
    norm: Any = first_layer(made(model_type)).input_layernorm
    x = torch.randn(2, 16)
    with torch.no_grad():
        weight = norm.weight.clone()
        norm.weight.zero_()
        plain = norm(x)
        norm.weight.copy_(weight)
        assert relative(norm(x), plain * (1 + weight)) < 1e-6
    assert plain.norm() > 1
    assert not torch.equal((1 + weight.bfloat16()) - 1, weight.bfloat16())


@pytest.mark.parametrize(
    ("model_type", "sibling", "tensor"),
    [
        ("exaone4", "exaone_moe", "post_feedforward_layernorm.weight"),
        ("glm4", "glm4_moe", "post_self_attn_layernorm.weight"),
        ("bitnet", "mixtral", "self_attn.attn_sub_norm.weight"),
        ("diffllama", "mixtral", "self_attn.lambda_q1"),
        ("stablelm", "mixtral", "input_layernorm.bias"),
        ("phimoe", "phi3", "input_layernorm.bias"),  # so that Phi-3 is none of its dense models
        ("lfm3", "lfm2_moe", "self_attn.g_proj.weight"),
    ],
)
def test_a_layer_has_a_tensor_that_the_sibling_lacks(
    model_type: str, sibling: str, tensor: str
) -> None:
    names = {n for n, _ in made(model_type).named_parameters() if ".layers." in n}
    theirs = {n for n, _ in made(sibling).named_parameters() if ".layers." in n}
    assert any(tensor in name for name in names - theirs)
    assert not any(name.endswith(tensor) for name in theirs)


@pytest.mark.parametrize("model_type", ["olmo", "nanochat"])
def test_norms_have_no_weights(model_type: str) -> None:
    assert not any("layernorm" in n for n, _ in made(model_type).named_parameters())


@pytest.mark.parametrize(
    ("model_type", "sibling", "field", "value"),
    [
        ("minicpm3", "deepseek_v3", "scale_emb", 3.0),
        ("minicpm3", "deepseek_v3", "scale_depth", 3.0),
    ],
)
def test_a_field_decides_what_the_sibling_cannot_say(
    model_type: str, sibling: str, field: str, value: float
) -> None:
    assert field not in CONFIG_MAPPING[sibling]().to_dict()
    with torch.no_grad():
        one, other = (
            made(model_type)(ids()).logits,
            made(model_type, **{field: value})(ids()).logits,
        )
    assert relative(other, one) > 1e-3


def test_gemma_3n_has_streams_that_no_sparse_model_has() -> None:
    fields = set(CONFIG_MAPPING["gemma3n_text"]().to_dict())
    assert {"altup_num_inputs", "laurel_rank"} <= fields
    for model_type in SPARSE:
        assert "laurel_rank" not in CONFIG_MAPPING[model_type]().to_dict()


def test_ministral_3_scales_queries_by_their_position() -> None:
    scale = get_llama_4_attn_scale(torch.tensor([[0, 99]]), 0.1, 10)
    assert scale.flatten()[1] > 1.2 * scale.flatten()[0]
    rope = CONFIG_MAPPING["ministral3"]().to_dict()["rope_parameters"]
    assert rope["llama_4_scaling_beta"] == 0.1
    assert "llama_4_scaling_beta" not in str(CONFIG_MAPPING["mixtral"]().to_dict())


def test_half_a_head_of_glm_rotates_in_pairs() -> None:
    x = torch.arange(8.0)
    assert not torch.equal(in_pairs(x), in_halves(x))
