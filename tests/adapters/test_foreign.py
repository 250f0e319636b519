"""What is no model of the family is named as what it is, in one short line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import moezoo
from tests.models.tiny import tiny

Q = "encoder.block.0.layer.0.SelfAttention.q"


def checkpoint(path: Path, names: list[str], values: dict[str, Any] | None = None) -> Path:
    """A directory with tensors of these names and this config.json, if any."""
    path.mkdir(exist_ok=True)
    save_file({name: torch.zeros(2, 2) for name in names}, path / "model.safetensors")
    if values is not None:
        (path / "config.json").write_text(json.dumps(values))
    return path


def refusal(path: Path) -> str:
    """The one message that load, read_config and upcycle share."""
    messages = set()
    for verb in (
        lambda: moezoo.load(path),
        lambda: moezoo.upcycle(path, path.parent / "out", num_experts=2),
    ):
        with pytest.raises(moezoo.MoezooError) as caught:
            verb()
        messages.add(str(caught.value))
    (message,) = messages
    assert "\n" not in message and len(message.replace(str(path), "")) < 300
    assert str(path) in message
    return message


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "'bert', BertForMaskedLM"),
        ({"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]}, "'gpt_neox'"),
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"model_type": "t5x"}, "Did you mean 't5'"),
        ({"model_type": "mpt", "architectures": ["MptForCausalLM"]}, "plug"),
        ({"model_type": ["t5"]}, "model_type"),
        ({"d_model": 4}, "names no model_type"),
        (
            {"model_type": "t5", "quantization_config": {"quant_method": "bitsandbytes"}},
            r"quantised \(bitsandbytes\)",
        ),
        ({"model_type": "moezoo", "quantization_config": {}}, "quantised"),
    ],
    ids=str,
)
def test_another_architecture_is_named_by_its_config(
    values: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = checkpoint(tmp_path / "in", ["bert.embeddings.word_embeddings.weight"], values)
    message = refusal(path)
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(message)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("bert.embeddings.word_embeddings.weight", "BERT"),
        ("model.layers.0.self_attn.q_proj.weight", "Llama"),
        ("model.decoder.layers.0.self_attn.q_proj.weight", "BART"),
        ("transformer.h.0.attn.c_attn.weight", "GPT-2"),
        (f"base_model.model.{Q}.lora_A.weight", "an adapter"),
        (f"{Q}.qweight", "GPTQ"),
        (f"{Q}.SCB", "bitsandbytes"),
        (f"{Q}.weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
        (f"{Q}.weight_scale_inv", "fp8"),
    ],
)
@pytest.mark.parametrize("values", [None, {"model_type": "t5"}], ids=["bare", "called T5"])
def test_without_a_config_it_is_named_by_its_tensors(
    name: str, said: str, values: dict[str, Any] | None, tmp_path: Path
) -> None:
    path = checkpoint(tmp_path / "in", [f"{Q}.weight", name], values)
    assert said in refusal(path) and name[:60] in refusal(path)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "model.safetensors"])
def test_an_adapter_is_named_even_beside_the_weights_that_it_changes(
    file: str, tmp_path: Path
) -> None:
    path = checkpoint(tmp_path / "in", [f"base_model.model.{Q}.lora_A.weight"])
    (path / "model.safetensors").rename(path / file)
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    assert "an adapter (PEFT)" in refusal(path) and "merge_and_unload" in refusal(path)


def test_a_tensor_of_no_family_is_named_without_a_list_of_those_that_are(tmp_path: Path) -> None:
    message = refusal(checkpoint(tmp_path / "in", [f"{Q}.weight", "something.else"]))
    assert "something.else" in message


def test_a_class_tells_the_family_where_no_model_type_does(tmp_path: Path) -> None:
    moezoo.save(tiny(num_experts=0), tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    values = json.loads(path.read_text())
    assert values.pop("model_type") == "t5"
    path.write_text(json.dumps(values))
    assert moezoo.load(tmp_path / "out").config.num_experts == 0
