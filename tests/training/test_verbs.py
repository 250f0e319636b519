"""train -> upcycle -> finetune -> generate -> evaluate on the command line, at tiny size."""

from __future__ import annotations

import json
import pydoc_data.topics
from pathlib import Path

import pytest

from moezoo.adapters.checkpoint import load
from moezoo.cli import main

CONFIG = {"vocab_size": 512, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "num_layers": 2}
FAST = ["--batch-size", "8", "--recipe", "small", "--table-every", "5", "--evaluate-every", "10"]


def moezoo(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten steps on a text file."""
    folder = tmp_path_factory.mktemp("train")
    topics: dict[str, str] = pydoc_data.topics.topics
    (folder / "text.txt").write_text("\n\n".join(topics[n] for n in sorted(topics)[:25]))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    code = moezoo(
        "train", folder / "run", "--config", folder / "config.json", "--text", folder / "text.txt",
        "--steps", 10, "--input-length", 32, *FAST,
    )  # fmt: skip
    assert code == 0
    return folder


def pairs_file(folder: Path) -> Path:
    path = folder / "pairs.jsonl"
    rows = [{"source": f"number {i % 7}", "target": f"value {i % 7}"} for i in range(60)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_from_text_to_a_fine_tuned_switch_model(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, sparse, tuned = trained / "run" / "model", trained / "switch", trained / "tuned"
    assert (dense / "spiece.model").is_file()
    assert moezoo("upcycle", dense, sparse, "--experts", 4, "--verify") == 0
    assert (sparse / "spiece.model").read_bytes() == (dense / "spiece.model").read_bytes()
    pairs = pairs_file(trained)
    code = moezoo(
        "finetune", sparse, tuned, "--pairs", pairs, "--steps", 6,
        "--expert-dropout", 0.4, "--label-smoothing", 0.1, "--examples", 4, *FAST,
    )  # fmt: skip
    assert code == 0
    assert "exact_match" in capsys.readouterr().out
    assert moezoo("generate", tuned / "model", "number 3", "--max-new-tokens", 5) == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert moezoo("evaluate", tuned / "model", "--pairs", pairs, "--json") == 0
    metrics = json.loads(capsys.readouterr().out)
    assert set(metrics) == {"cross_entropy", "examples", "exact_match", "token_f1"}
    assert metrics["examples"] == 60  # all of the file, not the tenth that `finetune` holds out
    assert metrics["cross_entropy"] > 0


def test_training_what_was_upcycled_says_which_router_it_has_and_how_to_have_the_other(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, pairs = trained / "run" / "model", pairs_file(tmp_path)
    words = ["--steps", 1, "--examples", 1, *FAST]

    def said(source: Path, out: str, *more: object) -> str:
        capsys.readouterr()
        code = moezoo("finetune", source, tmp_path / out, "--pairs", pairs, *words, *more)
        assert code == 0
        return " ".join(capsys.readouterr().err.split())

    assert moezoo("upcycle", dense, tmp_path / "switch", "--experts", 2) == 0
    assert moezoo("upcycle", dense, tmp_path / "unit", "--experts", 2, "--layout", "moezoo") == 0
    told = said(tmp_path / "switch", "a")
    assert "router: weighed by its probability" in told and "--layout moezoo" in told
    told = said(tmp_path / "unit", "b")
    assert "router: a weight of 1" in told and "export --fold" in told
    assert "--router switch" in told and "--router-learning-rate 0.01" in told
    assert "--router-learning-rate" not in said(
        tmp_path / "unit", "c", "--router-learning-rate", 0.1
    )
    # What was trained and saved again is still what was upcycled; a dense model is not.
    assert "router: a weight of 1" in said(tmp_path / "b" / "model", "d")
    assert "router:" not in said(dense, "e")


def test_a_small_models_config_that_is_silent_keeps_the_papers_initial_weights_and_says_so(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--text", trained / "text.txt", "--steps", 1, "--input-length", 32, *FAST]
    words += ["--seed", 3, "--learning-rate", "1e-9"]
    found = {}
    for name, fields, flags in (
        ("silent", {}, []),
        ("said", {"initializer_scale": 0.1}, []),
        ("set", {}, ["--set", "initializer_scale=null"]),
        ("null", {"initializer_scale": None}, []),
    ):
        config = tmp_path / f"{name}.json"
        config.write_text(json.dumps({**CONFIG, "num_experts": 2, **fields}))
        assert moezoo("train", tmp_path / name, "--config", config, *words, *flags) == 0
        assert ("initializer_scale=null" in capsys.readouterr().err) == (name == "silent")
        weights = load(tmp_path / name / "model").state_dict()
        found[name] = float(weights["encoder.blocks.1.mlp.experts.wo"].var() * 64)
    assert found["silent"] == found["said"] == pytest.approx(0.1, rel=0.1)
    assert found["set"] == found["null"] == pytest.approx(1.0, rel=0.1)


def test_a_run_writes_its_settings_and_every_step(trained: Path) -> None:
    settings = json.loads((trained / "run" / "config.json").read_text())
    assert settings["steps"] == 10
    rows = [json.loads(x) for x in (trained / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "loss" in r] == list(range(1, 11))
    assert [r["step"] for r in rows if "held_out" in r] == [10]


def test_a_vocabulary_is_as_large_as_the_text_allows_and_the_embedding_fits_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "small.txt"
    text.write_text("\n\n".join(pydoc_data.topics.topics[n] for n in ("if", "while", "for")))
    small = ["num_layers=1", "d_model=16", "d_kv=4", "d_ff=16", "num_heads=2"]
    words = ["--model", "t5-small", "--text", text, "--input-length", 32, *FAST, "--set", *small]
    assert moezoo("train", tmp_path / "run", "--steps", 1, *words) == 0
    said = capsys.readouterr().err
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    rows = config["vocab_size"]
    assert 200 < rows < 2000 and f"the embedding has {rows:,} rows" in said
    assert f"{rows - 100:,} pieces and 100 sentinels, learned from the text" in said
    assert moezoo("train", tmp_path / "run", "--steps", 2, "--resume", *words) == 0
    assert "learned" not in capsys.readouterr().err  # the run's own is taken again
    assert moezoo("train", tmp_path / "set", "--steps", 1, *words, "vocab_size=5000") == 0
    config = json.loads((tmp_path / "set" / "model" / "config.json").read_text())
    assert config["vocab_size"] == 5000


def test_pairs_that_the_vocabulary_lacks_are_warned_of(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("".join(f"number {i}\t{'ж' * (i % 3 == 0)} the\n" for i in range(30)))
    words = ["--pairs", pairs, "--no-header", "--steps", 1, "--examples", 2, *FAST]
    assert moezoo("finetune", trained / "run", tmp_path / "tuned", *words) == 0
    said = capsys.readouterr().err
    count = sum(i % 3 == 0 for i in range(30) if i % 10 != 9)
    assert f"warning: {count} of 27 targets hold text that the vocabulary lacks" in said


def test_a_finished_run_is_not_overwritten_by_another(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", trained / "run", "--config", trained / "config.json"]
    words += ["--text", trained / "text.txt", "--steps", 10, "--input-length", 32, *FAST]
    assert moezoo(*words) == 2
    assert "--resume" in capsys.readouterr().err
    assert moezoo(*words, "--resume") == 0
    assert moezoo(*words, "--resume", "--learning-rate", 0.5) != 0
    assert "recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "OUT", "--model", "t5-small", "--steps", "1"], "no text"),
        (["train", "OUT", "--python-text", "--steps", "1"], "what to train"),
        (["finetune", "nowhere", "OUT", "--task", "identifers", "--steps", "1"], "identifiers"),
        (["finetune", "nowhere", "OUT", "--task", "translation", "--steps", "1"], "needs pairs"),
        (["evaluate", "nowhere", "--pairs", "nothing.jsonl"], "nothing.jsonl"),
    ],
)
def test_bad_arguments_are_named(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert moezoo(*(tmp_path / w if w == "OUT" else w for w in words)) in (2, 3)
    assert message in capsys.readouterr().err
