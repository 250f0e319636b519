"""Whatever is said to from_pretrained and save_pretrained is done, or refused by its name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moezoo
from moezoo.adapters.hf import MoezooConfig, MoezooForConditionalGeneration, MoezooModel
from moezoo.config import SwitchConfig

from .tiny import SIZES, batch, wrapped

Model = MoezooForConditionalGeneration


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    wrapped().save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**batch()).logits
    return found


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["bfloat16", torch.bfloat16])
def test_a_dtype_is_followed_by_either_name(saved: Path, key: str, value: Any) -> None:
    model = Model.from_pretrained(saved, **{key: value})
    assert model.dtype == model.config.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_fields_of_the_config_are_arguments(saved: Path) -> None:
    model = Model.from_pretrained(
        saved, dropout_rate=0.4, use_cache=False, capacity="transformers",
        attn_implementation="eager",
    )  # fmt: skip
    assert model.encoder.blocks[0].dropout.p == 0.4
    assert model.config.use_cache is False
    assert model.model.config.capacity == "transformers"
    assert model.config._attn_implementation == "eager"


def test_a_typo_is_named(saved: Path) -> None:
    with pytest.raises(TypeError, match="dropout_ratte"):
        Model.from_pretrained(saved, dropout_ratte=0.4)
    with pytest.raises(ValueError, match="nonsense"):
        Model.from_pretrained(saved, attn_implementation="nonsense")
    with pytest.raises((ImportError, ValueError), match="bitsandbytes"):
        Model.from_pretrained(saved, quantization_config={"load_in_8bit": True})


def test_subfolders_variants_shards_and_given_weights(saved: Path, tmp_path: Path) -> None:
    model = Model.from_pretrained(saved)
    model.save_pretrained(tmp_path / "sub", variant="fp32", max_shard_size="20KB")
    names = os.listdir(tmp_path / "sub")
    assert "model.safetensors.index.fp32.json" in names
    assert sum(".safetensors" in name for name in names) > 3
    again = Model.from_pretrained(tmp_path, subfolder="sub", variant="fp32")
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(OSError, match="model.safetensors"):
        Model.from_pretrained(tmp_path, subfolder="sub")
    state = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    zeros = Model.from_pretrained(None, config=model.config, state_dict=state)
    assert not logits(zeros).any()


def test_the_loading_info_tells_what_was_not_there(saved: Path, tmp_path: Path) -> None:
    model, info = Model.from_pretrained(saved, output_loading_info=True)
    assert info["missing_keys"] == info["unexpected_keys"] == set()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["encoder.block.1.layer.1.mlp.router.classifier.weight"]
    tensors["surplus"] = torch.zeros(1)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again, info = Model.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"model.encoder.blocks.1.mlp.router.classifier.weight"}
    assert info["unexpected_keys"] == {"surplus"}
    for name, tensor in again.state_dict().items():
        drawn = name in info["missing_keys"]
        assert torch.equal(tensor, model.state_dict()[name]) is not drawn, name
        assert torch.isfinite(tensor).all()


def test_a_missing_weight_is_drawn_as_build_draws_it(tmp_path: Path) -> None:
    config = MoezooConfig(**{**SIZES, "d_model": 256, "d_ff": 512})
    model = Model.from_pretrained(None, config=config, state_dict={})
    built: Any = moezoo.build(config.switch, seed=0)
    for name, parameter in built.named_parameters():
        drawn = dict(model.model.named_parameters())[name]
        if parameter.numel() > 1000:
            torch.testing.assert_close(drawn.std(), parameter.std(), rtol=0.2, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_a_t5_directory_becomes_the_wrapper_and_computes_the_same(
    tied: bool, tmp_path: Path
) -> None:
    switch = SwitchConfig(**{**SIZES, "num_experts": 0, "tie_word_embeddings": tied})
    dense: Any = moezoo.build(switch, seed=0)
    moezoo.save(dense, tmp_path / "t5", layout="huggingface")
    loaded, info = Model.from_pretrained(tmp_path / "t5", output_loading_info=True)
    assert info["missing_keys"] == info["unexpected_keys"] == set()
    torch.testing.assert_close(logits(loaded), dense(**batch()).logits)
    assert loaded.config.model_type == "moezoo"
    alone = Model.from_pretrained(tmp_path / "t5" / "model.safetensors")
    torch.testing.assert_close(logits(alone), logits(loaded))
    body = MoezooModel.from_pretrained(tmp_path / "t5")
    ids = batch()["input_ids"]
    assert torch.isfinite(body(ids, None, ids).last_hidden_state).all()


def test_device_maps_and_offload_folders(saved: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = Model.from_pretrained(saved)
    places = {"model.shared": "cpu", "model.encoder": "disk", "model.decoder": "cpu",
              "model.lm_head": "cpu"}  # fmt: skip
    spread = Model.from_pretrained(saved, device_map=places, offload_folder=tmp_path / "off")
    assert spread.encoder.blocks[0].attention.q.weight.is_meta
    torch.testing.assert_close(logits(spread), logits(model))


class Hub:
    """The part of the hub's client that saving uses, offline: it keeps what it is given."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.repo = ""

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.repo = repo_id
        return type("Url", (), {"repo_id": repo_id})()

    def create_commit(self, repo_id: str, operations: Any, **options: Any) -> str:
        for operation in operations:
            path = operation.path_or_fileobj
            content = path if isinstance(path, bytes) else Path(path).read_bytes()
            self.files[operation.path_in_repo] = content
        return "done"


@pytest.mark.parametrize("verb", ["save_pretrained", "push_to_hub"])
def test_the_hub_gets_the_model_with_its_card(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import modeling_utils
    from transformers.utils import hub as hub_module

    hub, model = Hub(), wrapped()
    for module in (modeling_utils, hub_module):
        monkeypatch.setattr(module, "hf_api", lambda *arguments: hub, raising=False)
        for name in ("create_repo", "create_commit"):
            monkeypatch.setattr(module, name, getattr(hub, name), raising=False)

    def card(repo_id: str, tags: Any = None, **options: Any) -> Any:
        from huggingface_hub import ModelCard

        return ModelCard(f"---\ntags: {list(tags or [])}\n---\n# {repo_id}\n")

    monkeypatch.setattr(modeling_utils, "create_and_tag_model_card", card, raising=False)
    monkeypatch.setattr(hub_module, "create_and_tag_model_card", card, raising=False)
    model.add_model_tags(["mixture"])
    if verb == "save_pretrained":
        model.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="me/mine")
    else:
        model.push_to_hub("me/mine")
    assert hub.repo == "me/mine"
    assert {"config.json", "generation_config.json", "model.safetensors"} <= hub.files.keys()
    assert b"mixture" in hub.files["README.md"]
    for name, content in hub.files.items():
        (tmp_path / name).write_bytes(content)
    assert torch.equal(logits(Model.from_pretrained(tmp_path)), logits(model))
