"""Upcycled decoders that transformers, old or new, loads and saves: words, shards and dtypes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moezoo.adapters.upcycle import downcycle, upcycle
from moezoo.adapters.verify import verify
from moezoo.errors import MoezooError
from tests.conversion.decoders import FAMILIES, dense_decoder, edit_config, logits, relative


def resaved(path: Path, out: Path, dtype: torch.dtype) -> Path:
    """The checkpoint at `path` as transformers loads it in `dtype` and saves it, in shards."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    model.save_pretrained(out, max_shard_size="20KB")
    return out


def held(path: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saved_anew_is_verified_and_goes_back(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    source = dense_decoder(tmp_path / "dense", family, dtype=dtype)
    upcycle(source, tmp_path / "moe", num_experts=4)
    again = resaved(tmp_path / "moe", tmp_path / "again", dtype)
    found = verify(again, source, levels=[1, 2])
    assert found.passed, found.line
    downcycle(again, tmp_path / "back")
    before, after = held(source), held(tmp_path / "back")
    assert set(before) == set(after)
    assert all(t.dtype == after[n].dtype and torch.equal(t, after[n]) for n, t in before.items())


def test_what_differs_after_that_is_found(tmp_path: Path) -> None:
    """A window that layers have, a number of choices, and a router that was trained in float32."""
    source = dense_decoder(tmp_path / "windows", "qwen2, windows")
    upcycle(source, tmp_path / "moe", num_experts=4)
    again = resaved(tmp_path / "moe", tmp_path / "again", torch.float32)
    for field, value in (("sliding_window", 5), ("num_experts_per_tok", 3)):
        file = again / "config.json"
        before = file.read_text()
        edit_config(again, **{field: value})
        line = verify(again, source, levels=[1]).line
        assert "config.json disagrees with the recipe in" in line
        file.write_text(before)
    source = dense_decoder(tmp_path / "dense", "ernie4_5", dtype=torch.bfloat16)
    upcycle(source, tmp_path / "moe16", num_experts=4)
    again = resaved(tmp_path / "moe16", tmp_path / "again16", torch.bfloat16)
    file = next(f for f in again.glob("*.safetensors") if any("gate.w" in n for n in load_file(f)))
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("mlp.gate.weight"))
    assert tensors[name].dtype == torch.float32
    tensors[name][1, 2] *= 1.0 + 2**-20  # less than bfloat16 tells
    save_file(tensors, file, {"format": "pt"})
    assert f"{name} differs" in verify(again, source, levels=[2]).line


def test_a_shared_expert_is_compared_without_torch(tmp_path: Path) -> None:
    source = dense_decoder(tmp_path / "dense", "qwen2")
    upcycle(source, tmp_path / "moe", num_experts=2)
    program = (
        "import sys\nfrom moezoo.adapters.verify import verify\n"
        f"assert verify({str(tmp_path / 'moe')!r}, {str(source)!r}, levels=[1, 2]).passed\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_a_float16_model_comes_back_from_the_shared_expert(tmp_path: Path) -> None:
    """Halves of its smallest weights have no bit for their last."""
    source = dense_decoder(tmp_path / "dense", "qwen2")
    small = {n: (0.001 * t).half() for n, t in held(source).items()}
    save_file(small, source / "model.safetensors", {"format": "pt"})
    upcycle(source, tmp_path / "moe", num_experts=2)
    name = "model.layers.1.mlp.{}down_proj.weight"
    made = held(tmp_path / "moe")
    assert not torch.equal(made[name.format("experts.0.")] * 2, small[name.format("")])
    downcycle(tmp_path / "moe", tmp_path / "back")
    after = held(tmp_path / "back")
    assert all(torch.equal(tensor, after[n]) for n, tensor in small.items())


@pytest.mark.parametrize(
    ("family", "shared"),
    [
        ("qwen2", "mlp.shared_expert.down_proj.weight"),
        ("granitemoehybrid", "shared_mlp.output_linear.weight"),
    ],
)
@pytest.mark.parametrize("init", ["split", "virtual_group"])
def test_a_shared_expert_that_was_trained_beside_slices_is_not_dropped(
    init: str, family: str, shared: str, tmp_path: Path
) -> None:
    own = {"shared_intermediate_size" if "hybrid" in family else "intermediate_size": 32}
    source = dense_decoder(tmp_path / "dense", family, **own)
    upcycle(source, tmp_path / "moe", num_experts=4, init=init)
    downcycle(tmp_path / "moe", tmp_path / "back")
    before, after = held(source), held(tmp_path / "back")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    made = held(tmp_path / "moe")
    name = f"model.layers.1.{shared}"
    made[name] = 1.5 * made[name]
    save_file(made, tmp_path / "moe" / "model.safetensors", {"format": "pt"})
    with pytest.raises(MoezooError, match="the experts differ.*trained, merged, or not") as caught:
        downcycle(tmp_path / "moe", tmp_path / "again")
    assert "export" not in str(caught.value)


@pytest.mark.parametrize(
    "scaling", [{"type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 2.0}]
)
def test_scaling_of_an_old_file_is_told_to_old_and_new_classes(
    scaling: dict[str, Any], tmp_path: Path
) -> None:
    """transformers 4 reads `rope_scaling` and `rope_theta`, and drops other words in silence."""
    source = dense_decoder(tmp_path / "dense")
    edit_config(source, rope_parameters=..., rope_scaling=scaling, rope_theta=777.0)
    upcycle(source, tmp_path / "moe", num_experts=2)
    made = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert (made["rope_scaling"], made["rope_theta"]) == (scaling, 777.0)
    assert made["rope_parameters"] == {"rope_theta": 777.0, **scaling}
    assert relative(logits(tmp_path / "moe"), logits(source)) < 1e-5
    again = resaved(tmp_path / "moe", tmp_path / "again", torch.float32)
    assert verify(again, source).passed
    downcycle(again, tmp_path / "back")
    told = json.loads((tmp_path / "back" / "config.json").read_text())
    assert told["rope_scaling"] == scaling and "rope_parameters" not in told


@pytest.mark.parametrize("family", ["llama", "qwen2", "granite", "lfm2"])
def test_names_of_a_model_in_memory_are_sent_to_be_saved_by_others(
    family: str, tmp_path: Path
) -> None:
    source = dense_decoder(tmp_path / "dense", family)
    upcycle(source, tmp_path / "moe", num_experts=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    model.save_pretrained(tmp_path / "memory", save_original_format=False)
    with pytest.raises(MoezooError, match="as transformers has them in memory.*from_config"):
        downcycle(tmp_path / "memory", tmp_path / "back")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "memory")
    new = AutoModelForCausalLM.from_config(loaded.config)
    new.load_state_dict(loaded.state_dict())
    new.save_pretrained(tmp_path / "again")
    assert verify(tmp_path / "again", source, levels=[1, 2]).passed
