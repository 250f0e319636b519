"""`moezoo report` on a directory of transformers' own, as people download it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from moezoo import cli
from tests.hf.test_recording import model_of


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    """A directory as people download it, with a tokenizer of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "</s>", *"the quick brown fox jumps over a lazy dog".split()]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", eos_token="</s>"
    )
    model_of("mixtral").save_pretrained(tmp_path / "mixtral")
    tokenizer.save_pretrained(tmp_path / "mixtral")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over a lazy dog\n\n" * 40)
    return tmp_path


def report(folder: Path, *more: str) -> int:
    return cli.main(["report", str(folder / "mixtral"), "--text", str(folder / "text.txt"), *more])


def test_the_command_reports_a_mixtral(mixtral: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--length", "16", "--batches", "2", "--batch-size", "3", "--json"]
    assert report(mixtral, *arguments, "--out", str(mixtral / "page.html")) == 0
    document = json.loads(capsys.readouterr().out)
    first, second = document["layers"]
    (stream,) = document["streams"]
    assert first["name"] == "model.layers.0.mlp"
    assert first["tokens"] == 2 * 3 * 16 and stream["sequences"] == [16] * 6
    assert sum(second["load"]) == 2 * 2 * 3 * 16
    assert set(stream["pieces"]) <= {"</s>", *"the quick brown fox jumps over a lazy dog".split()}
    assert "model.layers.1.mlp" in (mixtral / "page.html").read_text()


def test_the_command_says_what_is_missing(
    mixtral: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(mixtral, "--length", "100000") == 2
    assert "the text has 400 tokens, a sequence has 100000" in capsys.readouterr().err
    for file in (mixtral / "mixtral").glob("tokenizer*"):
        file.unlink()
    assert report(mixtral) == 3
    said = capsys.readouterr().err
    assert "transformers cannot load its tokenizer" in said and "--tokenizer DIR" in said
    assert report(mixtral, "--tokenizer", str(mixtral / "nowhere")) == 3


def test_a_dense_model_has_nothing_to_report(
    mixtral: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(mixtral / "mixtral")
    assert report(mixtral, "--length", "8") == 2
    assert "LlamaForCausalLM has no experts to report on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("names", "the weights lack 'lm_head.weight' and 20 more, which transformers draws at"),
        ("shapes", "transformers cannot load it"),
        ("bytes", "transformers cannot load it"),
        ("rows", "the tokenizer gives the id 10, the model has 10 rows"),
    ],
)
def test_no_report_is_made_of_what_is_not_the_model(
    harm: str, said: str, mixtral: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = mixtral / "mixtral" / "model.safetensors"
    held = load_file(file)
    if harm == "names":
        held = {f"module.{name}": tensor for name, tensor in held.items()}
    if harm == "shapes":
        held["model.norm.weight"] = torch.ones(3)
    if harm == "rows":
        config = transformers.AutoConfig.from_pretrained(mixtral / "mixtral", vocab_size=10)
        config.save_pretrained(mixtral / "mixtral")
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            held[name] = held[name][:10].clone()
    save_file(held, file, {"format": "pt"})
    if harm == "bytes":
        file.write_bytes(b"xx")
    assert report(mixtral, "--length", "8") in (2, 3)
    assert said in capsys.readouterr().err
