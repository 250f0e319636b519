"""Every verb that reads text, on models shaped like the family's, with tokenizers like theirs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import moezoo
from moezoo import cli
from moezoo.tokenizer import tokenizer_of
from tests.real_files import unpacked
from tests.tokenizer.stand_ins import directory, families, t5_model

SIZES: dict[str, Any] = {
    "d_model": 8,
    "d_kv": 4,
    "d_ff": 8,
    "num_heads": 2,
    "num_layers": 2,
    "num_experts": 2,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "dropout_rate": 0.0,
}
OWN: dict[str, dict[str, Any]] = {
    "madlad": {"pad_token_id": 1, "eos_token_id": 2},
    "pile": {"eos_token_id": 2, "position_bias_every_layer": True},
    "umt5": {"position_bias_every_layer": True},
}
NAMES = ["mt5", "umt5", "byt5", "madlad", "pile", "flan", "transformers 5"]
REAL = ["t5", "mt5"]
RUN = "--steps 1 --batch-size 8 --recipe small".split()


def checkpoint(path: Path, tokenizer: Path, **fields: Any) -> Path:
    """A Switch model of random weights with a tokenizer's files and 28 embeddings to spare."""
    size = tokenizer_of(tokenizer).vocab_size + 28
    config = moezoo.SwitchConfig(vocab_size=size, **{**SIZES, **fields})
    moezoo.save(moezoo.build(config, seed=0), path)
    for file in tokenizer.iterdir():
        if file.name != "config.json":
            shutil.copyfile(file, path / file.name)
    return path


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("stand_ins")
    found = families(root / "tokenizers")
    try:
        import transformers
    except ImportError:
        pass
    else:
        source = directory(root / "t5", model=t5_model(), tokenizer_config={"extra_ids": 100})
        theirs = transformers.T5Tokenizer.from_pretrained(source)
        theirs.add_tokens(["<ctx>"])
        theirs.save_pretrained(root / "saved")
        found["transformers 5"] = root / "saved"
    return {
        name: checkpoint(root / "models" / name, path, **OWN.get(name, {}))
        for name, path in found.items()
    }


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prose, and pairs beside it."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(
        "\n\n".join(f"every object {i} has a type and a value. " * 5 for i in range(40))
    )
    rows = [json.dumps({"source": f"object {i}", "target": f"value {i}"}) for i in range(20)]
    path.with_name("pairs.jsonl").write_text("\n".join(rows))
    return path


def moezoo_(*words: object) -> None:
    assert cli.main([str(word) for word in words]) == 0


def tokenizer_files(path: Path) -> dict[str, bytes]:
    return tokenizer_of(path).files


def every_verb(model: Path, text: Path, out: Path) -> None:
    """Run them all; what is trained has every file of the tokenizer, byte for byte."""
    sample = ("--text", text, "--batches", 1, "--batch-size", 2, "--length", 32, "--json")
    moezoo_("report", model, *sample)
    moezoo_("quantize", model, *sample)
    moezoo_("train", out / "t", "--from", model, "--text", text, "--input-length", 64, *RUN)
    pairs = text.with_name("pairs.jsonl")
    moezoo_("finetune", out / "t/model", out / "f", "--pairs", pairs, "--examples", 1, *RUN)
    moezoo_("generate", out / "f/model", "every object", "--max-new-tokens", 3)
    moezoo_("evaluate", out / "f/model", "--pairs", pairs, "--examples", 1, "--json")
    assert tokenizer_files(out / "f/model") == tokenizer_files(model)
    facts = json.loads((out / "t/config.json").read_text())
    assert facts["mean_span"] == tokenizer_of(model).mean_span


@pytest.mark.parametrize("name", NAMES)
def test_every_verb_runs_on_a_model_of_the_family(
    name: str, stand_ins: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    if name not in stand_ins:
        pytest.skip("transformers is not installed")
    every_verb(stand_ins[name], text, tmp_path)


@pytest.mark.parametrize("name", REAL)
def test_every_verb_runs_with_the_real_tokenizer(name: str, text: Path, tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", unpacked(name, tmp_path / "files"))
    every_verb(model, text, tmp_path)


def test_every_verb_takes_another_tokenizer(
    stand_ins: dict[str, Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    moezoo.save(moezoo.load(stand_ins["umt5"]), bare)
    pairs = ("--pairs", text.with_name("pairs.jsonl"), "--examples", 1)
    sample = ("--text", text, "--batches", 1, "--batch-size", 2, "--length", 32, "--json")
    verbs: list[tuple[object, ...]] = [
        ("generate", bare, "every", "--max-new-tokens", 2),
        ("report", bare, *sample),
        ("quantize", bare, *sample),
        ("evaluate", bare, *pairs, "--json"),
        ("finetune", bare, tmp_path / "f", *pairs, *RUN),
        ("train", tmp_path / "t", "--from", bare, "--text", text, "--input-length", 64, *RUN),
    ]
    for words in verbs:
        assert cli.main([str(word) for word in words]) == 3
        assert "no tokenizer here" in capsys.readouterr().err
        for named in (stand_ins["flan"], stand_ins["flan"] / "spiece.model", "bytes"):
            for run in (tmp_path / "f", tmp_path / "t"):
                shutil.rmtree(run, ignore_errors=True)
            moezoo_(*words, "--tokenizer", named)
    assert tokenizer_files(tmp_path / "t/model") == moezoo.ByteTokenizer().files


def test_span_corruption_takes_its_numbers_from_flags(
    stand_ins: dict[str, Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", tmp_path / "t", "--from", stand_ins["byt5"], "--text", text, *RUN]
    words += ["--input-length", 64, "--noise-density", 0.5]
    moezoo_(*words, "--mean-span", 8)
    facts = json.loads((tmp_path / "t/config.json").read_text())
    assert (facts["noise_density"], facts["mean_span"]) == (0.5, 8.0)
    shutil.rmtree(tmp_path / "t")
    assert cli.main([str(word) for word in (*words, "--mean-span", 1)]) == 2
    assert "at most 11" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["transformers 5", "pile", "mt5"])
def test_conversions_carry_every_file_of_the_tokenizer(
    name: str, stand_ins: dict[str, Path], tmp_path: Path
) -> None:
    if name not in stand_ins:
        pytest.skip("transformers is not installed")
    dense = tmp_path / "dense"
    shutil.copytree(stand_ins[name], dense)
    changes = json.dumps({"<kept>": tokenizer_of(dense).vocab_size})
    (dense / "added_tokens.json").write_text(changes)
    (dense / "special_tokens_map.json").write_text("{}")
    grown = tmp_path / "grown"
    moezoo_("grow", dense, grown)
    assert tokenizer_files(grown) == tokenizer_files(dense)
    assert {"added_tokens.json", "special_tokens_map.json"} <= set(tokenizer_files(grown))
