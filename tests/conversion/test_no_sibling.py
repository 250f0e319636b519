"""What docs/stacks.md says of dense decoders without a row, held to the classes of transformers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.bamba import modeling_bamba as bamba
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm
from transformers.models.glm.modeling_glm import rotate_half as in_pairs
from transformers.models.glm4_moe.modeling_glm4_moe import rotate_half as in_halves
from transformers.models.granitemoehybrid import modeling_granitemoehybrid as granite
from transformers.models.ministral3.modeling_ministral3 import get_llama_4_attn_scale

from moezoo.adapters.families import family_of
from moezoo.adapters.families.sparse_decoders import SPARSE
from moezoo.errors import ConfigError
from tests.conversion.decoders import SIZES, ids, relative

_PAGE = Path(__file__).parents[2] / "docs" / "stacks.md"
_SHARED_BLOCK: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    "n_mamba_heads": 4,
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "cohere2_moe": {"layer_types": ["sliding_attention", "full_attention"]},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "mamba_n_heads": 4,
    },
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_moe_text": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 16},
    "zamba": _SHARED_BLOCK,
    "zamba2": {**_SHARED_BLOCK, "hybrid_layer_ids": [1, 3]},
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


def tiny(model_type: str, **options: Any) -> Any:
    """The config of a tiny model."""
    own = CONFIG_MAPPING[model_type]().to_dict()
    sizes = {**SIZES, "head_dim": 8} if "head_dim" in own else SIZES
    return AutoConfig.for_model(model_type, **{**sizes, **_OPTIONS.get(model_type, {}), **options})


def tensors(model_type: str, **options: Any) -> dict[str, tuple[int, ...]]:
    """The names of a tiny model's parameters with their shapes, of those that it shares once."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny(model_type, **options))
    return {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}


def made(model_type: str, **options: Any) -> nn.Module:
    """A tiny model of random weights, norms among them."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny(model_type, **options)).eval()
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
    matrices = [n for n, shape in tensors(model_type).items() if len(shape) == 2]
    assert sum(".layers.0.mlp." in name for name in matrices) == 2


@pytest.mark.parametrize(
    "model_type", ["gemma", "gemma2", "gemma3_text", "vaultgemma", "recurrent_gemma"]
)
def test_a_norm_weighs_by_one_and_its_weight(model_type: str) -> None:
    """In half precision, 1 + w is no weight that could be written."""
    layer: Any = first_layer(made(model_type))
    norm = getattr(layer, "input_layernorm", None) or layer.temporal_pre_norm
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
        ("doge", "mixtral", "post_attention_residual"),  # a weight on the stream itself
        ("xlstm", "mixtral", "mlstm_layer.igate_preact.weight"),
        ("gemma4_text", "qwen3_moe", "post_feedforward_layernorm.weight"),
        ("olmo_hybrid", "flex_olmo", "linear_attn.A_log"),
        ("olmo_hybrid", "qwen3_5_moe_text", "post_feedforward_layernorm.weight"),
    ],
)
def test_there_is_a_tensor_that_the_sibling_lacks(
    model_type: str, sibling: str, tensor: str
) -> None:
    names, theirs = tensors(model_type).keys(), tensors(sibling).keys()
    assert any(tensor in name for name in names - theirs)
    assert not any(name.endswith(tensor) for name in theirs)


@pytest.mark.parametrize(
    ("model_type", "tensor"),
    [
        ("modernbert-decoder", "embeddings.norm.weight"),
        ("cpmant", "position_bias.relative_attention_bias"),
    ],
)
@torch.no_grad()
def test_what_no_sparse_model_has_decides_what_a_model_computes(
    model_type: str, tensor: str
) -> None:
    """A norm between the embeddings and the first layer; a bias of scores by distance."""
    model = made(model_type)
    one = model(ids()).logits
    for name, parameter in model.named_parameters():
        if name.endswith(tensor):
            parameter.mul_(torch.linspace(0.5, 2.0, parameter.numel()).view_as(parameter))
    assert relative(model(ids()).logits, one) > 1e-2
    for sparse in SPARSE:
        between = [name for name in tensors(sparse) if ".layers." not in name]
        assert len(between) <= 3, sparse  # embeddings, the last norm, a head
        assert not any("bias" in n and "relative" in n for n in tensors(sparse))


def calls(model: nn.Module, *suffixes: str) -> list[tuple[str, int]]:
    """The modules of these names in the order in which a pass runs them, and how many positions
    each reads.
    """
    found: list[tuple[str, int]] = []
    for name, module in model.named_modules():
        if name.endswith(suffixes):
            short = name.rpartition(".")[2]

            def note(_: nn.Module, args: Any, kwargs: Any, short: str = short) -> None:
                read = next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
                found.append((short, read.shape[1]))

            module.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(ids(), use_cache=False)
    return found


def test_two_stacks_of_hrm_take_turns_within_a_step() -> None:
    """While a sparse model of transformers runs each of its layers once."""
    order = [name for name, _ in calls(made("hrm_text"), "L_module", "H_module")]
    turns = [name for i, name in enumerate(order) if order[i - 1 : i] != [name]]
    assert turns == ["L_module", "H_module"] * (len(turns) // 2)
    assert len(turns) >= 4
    assert calls(made("mixtral"), "mlp") == [("mlp", ids().shape[1])] * 2


def test_blt_runs_most_layers_on_patches_of_bytes() -> None:
    small = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 1,
             "intermediate_size": 24}  # fmt: skip
    local, whole = {**small, "hidden_size_global": 32}, {**small, "hidden_size": 32}
    sizes = {"patcher_config": small, "encoder_config": local, "decoder_config": local,
             "global_config": whole}  # fmt: skip
    config = AutoConfig.for_model(
        "blt", **sizes, encoder_hash_byte_group_vocab=64, patching_threshold=99.0
    )  # nats: a byte that is less of a surprise goes on with the patch
    torch.manual_seed(0)
    read = calls(
        AutoModelForCausalLM.from_config(config).eval(), "global_transformer", "local_encoder"
    )
    assert dict(read)["local_encoder"] == ids().shape[1]
    assert dict(read)["global_transformer"] < ids().shape[1]


@pytest.mark.parametrize("model_type", ["olmo", "nanochat"])
def test_norms_have_no_weights(model_type: str) -> None:
    assert not any("norm" in name for name in tensors(model_type))


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
    assert CONFIG_MAPPING["glm"]().rope_parameters["partial_rotary_factor"] == 0.5
    x = torch.arange(8.0)
    assert not torch.equal(in_pairs(x), in_halves(x))


def test_half_a_head_of_bamba_rotates_and_the_whole_of_granite() -> None:
    """So that its file, as published and by default, is none for the sparse Granite 4."""
    rope = CONFIG_MAPPING["bamba"]().rope_parameters
    assert rope["partial_rotary_factor"] == 0.5
    config = tiny("granitemoehybrid", rope_parameters=rope)
    head = config.hidden_size // config.num_attention_heads
    assert 2 * len(bamba.BambaRotaryEmbedding(config).inv_freq) == head // 2
    assert 2 * len(granite.GraniteMoeHybridRotaryEmbedding(config).inv_freq) == head
    heads, angle = torch.ones(1, 1, 3, 8), torch.zeros(1, 3, 4)
    turned, _ = bamba.apply_rotary_pos_emb(heads, heads, angle, angle)
    assert torch.equal(turned[..., 4:], heads[..., 4:])
    with pytest.raises(RuntimeError):
        granite.apply_rotary_pos_emb(heads, heads, angle, angle)


def mixers(model_type: str) -> list[set[str]]:
    """By layer, which of attention and of state spaces and their like it has."""
    found: dict[str, set[str]] = {}
    for name in tensors(model_type):
        layer, _, part = name.partition(".layers.")[2].partition(".")
        kind = part.partition(".")[0]
        if kind in ("self_attn", "mamba", "linear_attn", "conv"):
            found.setdefault(layer, set()).add(kind)
    return list(found.values())


def test_a_layer_of_falcon_h1_has_attention_and_state_spaces_side_by_side() -> None:
    assert mixers("falcon_h1") == [{"self_attn", "mamba"}] * 2
    for model_type in (*SPARSE, "jamba"):
        assert [len(kinds) for kinds in mixers(model_type)] == [1, 1], model_type


@pytest.mark.parametrize("model_type", ["zamba", "zamba2"])
def test_layers_of_zamba_share_a_block_that_reads_the_embeddings_too(model_type: str) -> None:
    def queries(shapes: dict[str, tuple[int, ...]]) -> list[int]:
        return [s[1] for name, s in shapes.items() if name.endswith("q_proj.weight")]

    assert queries(tensors(model_type)) == [2 * SIZES["hidden_size"]]  # of two layers
    for sparse in (*SPARSE, "jamba"):
        assert set(queries(tensors(sparse))) <= {SIZES["hidden_size"]}


@torch.no_grad()
def test_gemma_4_norms_what_its_mlp_and_its_experts_give_before_it_adds_them() -> None:
    experts = {"enable_moe_block": True, "num_experts": 2, "top_k_experts": 1,
               "moe_intermediate_size": 8}  # fmt: skip
    sparse, dense = tensors("gemma4_text", **experts), tensors("gemma4_unified_text")
    layer = "model.layers.0."
    for part in ("mlp.gate_proj.weight", "experts.gate_up_proj",
                 "post_feedforward_layernorm_1.weight", "post_feedforward_layernorm_2.weight",
                 "post_feedforward_layernorm.weight"):  # fmt: skip
        assert layer + part in sparse
    assert layer + "post_feedforward_layernorm.weight" in dense
    assert layer + "post_feedforward_layernorm_1.weight" not in dense
    norm, small = Gemma4RMSNorm(16), 1e-3 * torch.randn(2, 16)
    assert relative(norm(norm(small)), norm(small)) > 0.1  # so that two are not one


@pytest.mark.parametrize(
    ("model_type", "whole"),
    [
        ("cohere_compass_text", "cohere_compass"),
        ("gemma4_text", "gemma4"),
        ("gemma4_unified_text", "gemma4_unified"),
        ("emu3", "emu3"),
        ("mllama", "mllama"),
        ("phi4_multimodal", "phi4_multimodal"),
    ],
)
def test_a_decoder_is_part_of_a_model_of_several_modalities(model_type: str, whole: str) -> None:
    """Its checkpoints are of the whole, and refused with the way out."""
    parts = CONFIG_MAPPING[whole].sub_configs
    assert {"vision_config", "vq_config"} & set(parts)
    if model_type == "phi4_multimodal":
        assert any("image_embed" in name for name in tensors(model_type))
    elif whole != model_type:
        assert parts["text_config"].model_type == model_type
    for name in (model_type, whole):
        with pytest.raises(ConfigError, match=r"moezoo\.plug"):
            family_of({"model_type": name})


def test_every_decoder_of_the_page_has_a_trial_here() -> None:
    rows = _PAGE.read_text("utf-8").partition("| dense | what its nearest")[2].partition("\n\n")[0]
    names = [
        name
        for row in rows.splitlines()
        for name in re.findall(r"`([\w-]+)`", row.split("|")[1] if row.startswith("|") else "")
    ]
    text = Path(__file__).read_text("utf-8")
    assert len(names) > 30
    assert [name for name in names if f'"{name}"' not in text] == []
