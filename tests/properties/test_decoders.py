"""Upcycled decoders against a reference that reads the published names from the file by itself."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from moezoo.adapters.families.decoder_config import DecoderConfig
from moezoo.adapters.families.decoders import decoder_family
from moezoo.adapters.families.sparse_decoders import SPARSE
from moezoo.adapters.tensor_files import TensorPlan, wholes
from moezoo.adapters.upcycle import downcycle, upcycle
from moezoo.adapters.upcycle.grow import grow
from moezoo.errors import ConfigError
from moezoo.frozen import frozen

SIZES = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
Weights = dict[str, Tensor]


def dense(path: Path, model_type: str, **fields: Any) -> Weights:
    """A dense decoder of random weights on disk."""
    values = {"model_type": model_type, **SIZES, **fields}
    family = decoder_family(values)
    assert family is not None
    shapes = family.shapes(DecoderConfig(frozen(values)), "any")
    parts = [TensorPlan(family.disk_names(name)[0], "F32", shape)
             for name, shape in shapes.items()]  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    held = {plan.name: torch.randn(plan.shape, generator=generator) for plan in wholes(parts)}
    path.mkdir()
    save_file(held, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(values))
    return held


def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def matrices(held: Weights, start: str) -> list[Tensor]:
    """Gate, up and down of a dense layer, of which some files hold the first two in one tensor."""
    both = held.get(f"{start}mlp.gate_up_proj.weight")
    names = ("gate_proj", "up_proj") if both is None else ()
    inner = [held[f"{start}mlp.{name}.weight"] for name in names] or list(both.chunk(2))
    return [*inner, held[f"{start}mlp.down_proj.weight"]]


def routed(
    x: Tensor,
    router: Tensor,
    experts: list[Tensor],
    k: int,
    bias: Tensor | float,
    *,
    alone: bool = False,
) -> Tensor:
    """The sum of the k best of some results (T, D), weighed by probabilities that add up to 1;
    `alone`: each a sigmoid of its own.
    """
    probs = (x @ router.T).sigmoid() if alone else (x @ router.T).softmax(-1)
    chosen = (probs + bias).topk(k).indices
    weights = torch.zeros_like(probs).scatter(1, chosen, probs.gather(1, chosen))
    weights = weights / weights.sum(-1, keepdim=True)
    return (weights.T[:, :, None] * torch.stack(experts)).sum(0)


def sparse(x: Tensor, held: Weights, model_type: str, start: str, k: int) -> Tensor:
    """A sparse layer as its paper and its class compute it, by the names of published files."""
    names = ("gate_proj", "up_proj", "down_proj")
    if model_type == "granitemoe":
        inner, outer = (
            held[f"{start}block_sparse_moe.{n}_linear.weight"] for n in ("input", "output")
        )
        parts = [(*one.chunk(2), out) for one, out in zip(inner, outer, strict=True)]
        router = held[f"{start}block_sparse_moe.router.layer.weight"]
        return routed(x, router, [mlp(x, *part) for part in parts], k, 0.0)
    block = "block_sparse_moe." if model_type == "mixtral" else "mlp."
    names = ("w1", "w3", "w2") if model_type == "mixtral" else names
    count = len(
        {n.split("experts.")[1].split(".")[0] for n in held if f"{start}{block}experts." in n}
    )
    results = [
        mlp(x, *(held[f"{start}{block}experts.{e}.{name}.weight"] for name in names))
        for e in range(count)
    ]
    gate = "gate.wg" if model_type == "hunyuan_v1_moe" else "gate"
    of = "gate" if (alone := model_type == "deepseek_v3") else "moe_statics"
    bias = held.get(f"{start}mlp.{of}.e_score_correction_bias", torch.zeros(1))
    y = routed(x, held[f"{start}{block}{gate}.weight"], results, k, bias, alone=alone)
    shared = {"qwen2_moe": "shared_expert", "hunyuan_v1_moe": "shared_mlp",
              "deepseek_v3": "shared_experts"}.get(model_type)  # fmt: skip
    if shared is None:
        return y
    common = mlp(x, *(held[f"{start}mlp.{shared}.{name}.weight"] for name in names))
    scale = held.get(f"{start}mlp.shared_expert_gate.weight")
    return y + common * (1.0 if scale is None else torch.sigmoid(x @ scale.T))


PAIRS = {"llama": "mixtral", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe", "granite": "granitemoe",
         "ernie4_5": "ernie4_5_moe", "hunyuan_v1_dense": "hunyuan_v1_moe",
         "phi3": "mixtral", "youtu": "deepseek_v3"}  # fmt: skip


@pytest.mark.parametrize("model_type", PAIRS)
@settings(deadline=None, max_examples=4)  # each writes four checkpoints to the disk
@given(experts=st.integers(1, 5), data=st.data())
def test_a_sparse_layer_is_the_mlp_that_it_was_made_from_and_grows(
    model_type: str, experts: int, data: st.DataObject
) -> None:
    experts = max(experts, SPARSE[PAIRS[model_type]].fewest)
    k = data.draw(st.integers(1, experts))
    with tempfile.TemporaryDirectory() as folder:
        before = dense(Path(folder) / "dense", model_type)
        upcycle(Path(folder) / "dense", Path(folder) / "moe", num_experts=experts,
                router={"name": "top_k", "k": k})  # fmt: skip
        made = load_file(Path(folder) / "moe" / "model.safetensors")
        start = "model.layers.1."
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(experts))
        expected = mlp(x, *matrices(before, start))
        assert_near(sparse(x, made, PAIRS[model_type], start, k), expected)
        if model_type == "phi3":
            whole = before[f"{start}self_attn.qkv_proj.weight"].split([8, 4, 4])
            for name, part in zip("qkv", whole, strict=True):
                assert torch.equal(made[f"{start}self_attn.{name}_proj.weight"], part)
        downcycle(Path(folder) / "moe", Path(folder) / "back")
        after = load_file(Path(folder) / "back" / "model.safetensors")
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
        generator = torch.Generator().manual_seed(1)
        made = {n: t + 0.3 * torch.randn(t.shape, generator=generator) for n, t in made.items()}
        save_file(made, Path(folder) / "moe" / "model.safetensors")
        grow(Path(folder) / "moe", Path(folder) / "big")
        grown = load_file(Path(folder) / "big" / "model.safetensors")
        values = json.loads((Path(folder) / "big" / "config.json").read_text())
        twice = next(
            v for n, v in values.items() if n in ("num_experts_per_tok", "moe_k", "moe_topk")
        )
        assert_near(
            sparse(x, grown, PAIRS[model_type], start, twice),
            sparse(x, made, PAIRS[model_type], start, k),
        )


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize(
    ("model_type", "fields", "told"),
    [
        ("llama", {"sliding_window": 3}, {"sliding_window": None, "rope_theta": 10_000.0,
                                          "rms_norm_eps": 1e-6}),
        ("llama", {"rope_parameters": {"rope_type": "default"}},
         {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0},
                   "rope_scaling": {"type": "linear", "factor": 3.0}, "num_experts": 9},
         {"rope_parameters": {"type": "linear", "factor": 3.0, "rope_theta": 10_000.0},
          "rope_scaling": {"type": "linear", "factor": 3.0}, "rope_theta": 10_000.0,
          "num_experts": None, "num_local_experts": 2}),
        ("olmo2", {"rope_theta": 5.0}, {"rope_theta": 5.0, "rms_norm_eps": 1e-5}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
         {"layer_types": ["full_attention", "sliding_attention"], "norm_topk_prob": True}),
        ("qwen2", {"max_window_layers": 1}, {"layer_types": ["full_attention"] * 2}),
        ("ministral", {}, {"qkv_bias": False, "use_sliding_window": True, "max_window_layers": 0}),
        ("helium", {}, {"use_bias": False, "rope_theta": 100_000.0}),
        ("granitemoehybrid", {"num_local_experts": 0, "shared_intermediate_size": 10},
         {"num_local_experts": 2, "shared_intermediate_size": 10, "intermediate_size": 10}),
        ("lfm2", {"intermediate_size": 36, "block_multiple_of": 7},
         {"intermediate_size": 28, "moe_intermediate_size": 28, "num_dense_layers": 0}),
        ("youtu", {}, {"n_group": 1, "routed_scaling_factor": 1.0, "head_dim": 64}),
        ("hyperclovax", {"use_post_norm": False, "logits_scaling": 4.0},
         {"logits_scaling": 0.25, "attention_multiplier": 0.5}),
        ("smollm3", {"no_rope_layers": [1, 0], "rope_theta": 7.0},
         {"layer_rope_theta": [7.0, 0.0], "layer_types": ["full_attention"] * 2}),
        ("mistral", {}, {"sliding_window": 4096, "max_position_embeddings": 131072}),
    ],
)  # fmt: skip
def test_what_a_silent_config_means_is_spelled_out(
    model_type: str, fields: dict[str, Any], told: dict[str, Any], tmp_path: Path
) -> None:
    """The classes of the siblings assume other values, or read what the dense ones do not."""
    dense(tmp_path / "dense", model_type, **fields)
    upcycle(tmp_path / "dense", tmp_path / "moe", num_experts=2)
    values = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert {name: values.get(name) for name in told} == told


def test_sinks_that_a_dense_model_lacks_take_nothing(tmp_path: Path) -> None:
    dense(tmp_path / "dense", "smollm3")
    upcycle(tmp_path / "dense", tmp_path / "moe", num_experts=2)
    made = load_file(tmp_path / "moe" / "model.safetensors")
    for layer in range(2):
        assert (made[f"model.layers.{layer}.self_attn.sinks"] < -1e4).all()


def test_a_field_of_rope_that_the_sibling_lacks_is_refused_where_it_is_nested(
    tmp_path: Path,
) -> None:
    dense(tmp_path / "dense", "phi3", rope_parameters={"partial_rotary_factor": 0.5})
    with pytest.raises(ConfigError, match="no partial_rotary_factor but 1.0; .*found 0.5") as one:
        upcycle(tmp_path / "dense", tmp_path / "moe", num_experts=2)
    assert str(tmp_path / "dense" / "config.json") in str(one.value)
    assert not (tmp_path / "moe").exists()
