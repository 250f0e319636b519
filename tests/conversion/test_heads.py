"""Heads that moezoo's models do not have are refused by name, or dropped when told to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import moezoo
from moezoo.adapters.checkpoint_source import open_checkpoint
from moezoo.adapters.transformers import from_transformers
from moezoo.adapters.verify import verify
from moezoo.cli import main
from moezoo.errors import ConfigError, TensorMismatch
from tests.conversion.dense import SIZES, dense_t5, encoder_only, ids

HEADS = {
    "T5ForSequenceClassification": "classification_head.dense.bias",
    "T5ForTokenClassification": "classifier.bias",
    "T5ForQuestionAnswering": "qa_outputs.bias",
    "MT5ForSequenceClassification": "classification_head.dense.bias",
    "UMT5ForTokenClassification": "classifier.bias",
    "UMT5ForQuestionAnswering": "qa_outputs.bias",
}
REAL = Path(__file__).parents[3] / "shared" / "real" / "configs"


def with_head(path: Path, kind: str) -> Any:
    """A model of transformers with a head, saved; pad and length of labels are what they are."""
    cls = getattr(transformers, kind)
    torch.manual_seed(0)
    model = cls(cls.config_class(**SIZES, eos_token_id=1, num_labels=3)).eval()
    model.save_pretrained(path)
    return model


def hidden(model: Any) -> Tensor:
    """What the model under the head computes."""
    inner = getattr(model, "transformer", model)
    with torch.no_grad():
        encoded = inner.encoder(input_ids=ids()).last_hidden_state
        if not hasattr(inner, "decoder"):
            return encoded
        found: Tensor = inner.decoder(
            input_ids=ids(seed=1), encoder_hidden_states=encoded
        ).last_hidden_state
        return found


def ours(model: Any) -> Tensor:
    with torch.no_grad():
        whole = hasattr(model, "decoder")
        made = model(ids(), decoder_input_ids=ids(seed=1)) if whole else model(ids())
    assert made.logits is None
    return made.last_hidden_state


@pytest.mark.parametrize("kind", HEADS)
def test_a_trained_head_is_refused_by_name_with_the_way_out(kind: str, tmp_path: Path) -> None:
    with_head(tmp_path / "t5", kind)
    for read in (moezoo.load, open_checkpoint):
        with pytest.raises(TensorMismatch, match=f"no head such as '{HEADS[kind]}'.*--drop-heads"):
            read(tmp_path / "t5")
    assert main(["upcycle", str(tmp_path / "t5"), str(tmp_path / "up"), "--experts", "2"]) == 3
    assert not (tmp_path / "up").exists()


@pytest.mark.parametrize("kind", HEADS)
def test_a_dropped_head_leaves_the_model_under_it(kind: str, tmp_path: Path) -> None:
    source, up, back = tmp_path / "t5", tmp_path / "up", tmp_path / "back"
    theirs = with_head(source, kind)
    expected = hidden(theirs)
    torch.testing.assert_close(ours(moezoo.load(source, drop_heads=True)), expected)
    words = ["upcycle", str(source), str(up), "--experts", "4", "--drop-heads", "--verify"]
    assert main(words) == 0
    torch.testing.assert_close(ours(moezoo.load(up, capacity="dropless")), expected)
    found = verify(up, source)
    assert found.passed, found.line
    assert "of a head that was dropped" in found.line
    made = json.loads((up / "config.json").read_text())
    assert HEADS[kind] in made["moezoo_provenance"]["dropped_heads"]
    moezoo.downcycle(up, back)
    kept = {
        n.removeprefix("transformer."): t
        for n, t in load_file(source / "model.safetensors").items()
    }
    whole = load_file(back / "model.safetensors")
    assert whole and all(torch.equal(tensor, kept[name]) for name, tensor in whole.items())
    torch.testing.assert_close(ours(moezoo.load(back)), expected)
    live = moezoo.upcycle(theirs, num_experts=4, drop_heads=True)
    torch.testing.assert_close(ours(live), expected)
    with pytest.raises(ConfigError, match="drop_heads=True"):
        moezoo.upcycle(theirs, num_experts=4)


def test_every_verb_that_takes_dense_models_can_drop_heads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(tmp_path / "t5")
    expected = hidden(with_head(tmp_path / "t5", "T5ForSequenceClassification"))
    assert main(["export", source, str(tmp_path / "out"), "--drop-heads"]) == 0
    assert main(["merge", source, source, "--out", str(tmp_path / "two"), "--drop-heads"]) == 0
    for made in ("out", "two"):
        found = ours(moezoo.load(tmp_path / made, capacity="dropless"))
        torch.testing.assert_close(found, expected)
    capsys.readouterr()
    assert main(["plan", source, "--experts", "2", "--drop-heads"]) == 0
    assert main(["info", source]) == 3
    assert main(["info", source, "--drop-heads"]) == 0
    assert "classification_head.dense.bias (of a head that was dropped)" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["v_head.summary.weight", "score.weight", "regressor.bias"])
def test_heads_of_other_libraries_are_heads_and_other_tensors_are_not(
    name: str, tmp_path: Path
) -> None:
    source = dense_t5(tmp_path / "t5")
    file = source / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, name: torch.ones(3)}, file, {"format": "pt"})
    with pytest.raises(TensorMismatch, match="--drop-heads"):
        moezoo.load(source)
    kept, plain = moezoo.load(source, drop_heads=True), moezoo.load(dense_t5(tmp_path / "plain"))
    assert kept.config == plain.config and type(kept) is type(plain)
    save_file({**weights, "stranger.weight": torch.ones(3)}, file, {"format": "pt"})
    with pytest.raises(TensorMismatch, match=r"unexpected tensor 'stranger\.weight'"):
        moezoo.load(source, drop_heads=True)


def test_what_stands_beside_a_prefix_is_the_larger_models_or_refused(tmp_path: Path) -> None:
    source = encoder_only(tmp_path / "t5")
    weights = load_file(source / "model.safetensors")
    prefixed = {f"text.t5.{name}": tensor for name, tensor in weights.items()}
    prefixed["unet.score.weight"] = torch.ones(3)
    save_file(prefixed, tmp_path / "large.safetensors", {"format": "pt"})
    with open_checkpoint(tmp_path / "large.safetensors") as checkpoint:
        assert checkpoint.left_out == {"unet.score.weight": "of the larger model around it"}
    save_file(prefixed, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(TensorMismatch, match=r"'unet\.score\.weight' beside the model"):
        moezoo.load(source)


@pytest.mark.parametrize("name", ["T5WithLMHeadModel", "T5ForConditionalGeneration", "T5Model"])
def test_only_a_model_without_a_head_is_one(name: str, tmp_path: Path) -> None:
    source = dense_t5(tmp_path / "t5")
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**values, "architectures": [name]}))
    headless = name == "T5Model"
    assert isinstance(moezoo.load(source), moezoo.SwitchForConditionalGeneration) != headless
    with open_checkpoint(source) as checkpoint:
        assert checkpoint.task == ("model" if headless else "conditional_generation")


@pytest.mark.parametrize("file", ["t5-base-snli-cls", "codet5-defect-cls"])
def test_published_classifiers_are_refused_by_their_head_and_load_without(
    file: str, tmp_path: Path
) -> None:
    published = REAL / f"{file}.json"
    if not published.is_file():
        pytest.skip(f"{published} is not there")
    small = {**SIZES, "num_decoder_layers": 2}
    values = {**json.loads(published.read_text()), **small}
    with_head(tmp_path / "t5", "T5ForSequenceClassification")
    (tmp_path / "t5/config.json").write_text(json.dumps(values))
    with pytest.raises(TensorMismatch, match="classification_head"):
        moezoo.load(tmp_path / "t5")
    assert isinstance(moezoo.load(tmp_path / "t5", drop_heads=True), moezoo.SwitchModel)


def test_a_live_head_of_another_library_is_not_dropped_in_silence() -> None:
    class ValuedForConditionalGeneration(transformers.T5ForConditionalGeneration):
        """A model with a value head, as reinforcement learning puts it there."""

    model = ValuedForConditionalGeneration(transformers.T5Config(**SIZES))
    model.v_head = torch.nn.Linear(16, 1)
    with pytest.raises(TensorMismatch, match=r"v_head\.weight"):
        from_transformers(model)
    kept = from_transformers(model, drop_heads=True)
    assert isinstance(kept, moezoo.SwitchForConditionalGeneration)
