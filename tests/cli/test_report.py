"""The verb `report`: a page, a table or JSON, of a text, pairs, ids or a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import moezoo
from moezoo import cli
from moezoo.cli.terminal import table
from moezoo.reporting.advice import advice
from moezoo.reporting.packing import unpacked
from moezoo.reporting.report import Report
from moezoo.reporting.summary import HEADER, facts, rows, sparkline

CONFIG = moezoo.SwitchConfig(
    vocab_size=400, d_model=16, d_kv=4, d_ff=24, num_heads=2, num_layers=2, num_experts=4
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Switch checkpoint that reads bytes, and beside it the dense one that it was made from."""
    folder = tmp_path_factory.mktemp("report")
    dense = moezoo.build(CONFIG, seed=0, num_experts=0)
    for name, built in (("dense", dense), ("switch", moezoo.upcycle(dense, num_experts=4))):
        moezoo.save(built, folder / name)
        settings = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125}
        (folder / name / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "text.txt").write_text("An expert is chosen by <its> router.\n" * 60)
    return folder / "switch"


SMALL = "--batches 2 --batch-size 2 --length 32".split()


def embedded(page: Path) -> dict:
    text = page.read_text()
    mark = '<script type="application/json" id="moezoo-report">'
    return json.loads(text.partition(mark)[2].partition("</script>")[0])


def test_the_verb_prints_a_table_and_writes_a_page(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["report", str(model), "--text", str(model.parent / "text.txt"), *SMALL]
    page = tmp_path / "page.html"
    assert cli.main([*words, "--against", str(model.parent / "dense"), "--out", str(page)]) == 0
    said = capsys.readouterr().out
    assert "encoder.blocks.1.mlp" in said and "outputs apart by" in said
    document = embedded(page)
    assert (document["format"], document["version"]) == ("moezoo.report", 1)
    assert document["layers"][0]["offered"] == 2 * 2 * 32
    assert document["pair"]["error"] < 1e-5
    assert " " in document["streams"][0]["pieces"]
    assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layers"] == document["layers"]
    assert cli.main([*words, "--format", "html"]) == 0
    assert capsys.readouterr().out.startswith("<!doctype html>")


def test_pairs_are_read_whole_and_in_their_fields(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"source": "abc", "target": "de"}\n' * 3)
    assert cli.main(["report", str(model), "--pairs", str(pairs), "--json"]) == 0
    encoder, decoder = json.loads(capsys.readouterr().out)["streams"]
    shown = [[t["pieces"][row] for row in unpacked(t["piece"])] for t in (encoder, decoder)]
    assert shown[0] == ["a", "b", "c", "</s>"] * 3
    assert shown[1] == ["<pad>", "d", "e"] * 3


@pytest.mark.parametrize(
    ("given", "encoder", "decoder"),
    [
        ([[5, 6], [7]], [" 5", " 6", " 7"], [" 0", " 0"]),
        ([5, 6], [" 5", " 6"], [" 0"]),
        ({"input_ids": [[5], [6]], "labels": [[8, 9], [3]]}, [" 5", " 6"], [" 0", " 8", " 0"]),
    ],
)
def test_ids_need_no_tokenizer(
    given: object, encoder: list[str], decoder: list[str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    moezoo.save(moezoo.build(CONFIG, seed=0), tmp_path / "model")
    (tmp_path / "ids.json").write_text(json.dumps(given))
    words = ["report", str(tmp_path / "model"), "--ids", str(tmp_path / "ids.json"), "--json"]
    assert cli.main(words) == 0
    found = json.loads(capsys.readouterr().out)["streams"]
    shown = [[t["pieces"][row] for row in unpacked(t["piece"])] for t in found]
    assert shown == [encoder, decoder]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[[1], []]", "another form"),
        ("[]", "another form"),
        ("[[1.5]]", "another form"),
        ("[[true]]", "another form"),
        ("[[-1]]", "another form"),
        ('{"ids": [[1]]}', "another form"),
        ('{"input_ids": [[1]], "labels": [[1], [2]]}', "not one target per source"),
        ("[[1", "no readable JSON"),
        ("[[100000]]", "100000"),
    ],
)
def test_ids_of_another_form_are_named(
    content: str, said: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ids.json").write_text(content)
    page = tmp_path / "page.html"
    words = ["report", str(model), "--ids", str(tmp_path / "ids.json"), "--out", str(page)]
    assert cli.main(words) in (2, 3)
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and not page.exists()


def test_a_run_alone_needs_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.0}\n')
    page = tmp_path / "page.html"
    assert cli.main(["report", "--run", str(tmp_path), "--out", str(page)]) == 0
    assert "2 steps, loss 2.00 at the end" in capsys.readouterr().out
    assert embedded(page)["run"]["loss"] == [2.5, 2.0] and embedded(page)["layers"] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing to report on"),
        (["--run", "x", "--against", "y"], "nothing to report on"),
        (["{model}", "--text", "a", "--ids", "b"], "a report is of one text"),
        (["{model}", "--run", "nowhere"], "holds no metrics.jsonl"),
        (["{model}", "--tokens", "0"], "at least one token"),
    ],
)
def test_what_does_not_go_together_is_said(
    words: list[str], said: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word.replace("{model}", str(model)) for word in words]
    assert cli.main(["report", *given, *SMALL]) == 2
    assert said in capsys.readouterr().err


def test_a_dense_model_is_reported_as_one_expert_per_mlp(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = str(model.parent / "dense")
    text = str(model.parent / "text.txt")
    assert cli.main(["report", dense, "--text", text, *SMALL]) == 0
    assert "every MLP is one expert" in capsys.readouterr().out


def test_a_page_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("")
    with pytest.raises(moezoo.MoezooError):
        moezoo.report(
            moezoo.build(CONFIG, seed=0), [{"input_ids": torch.ones(1, 3).long(),
            "labels": torch.ones(1, 2).long()}],
        ).save(target / "page.html")  # fmt: skip


def test_a_notebook_gets_a_frame_that_cannot_reach_it() -> None:
    document = {"title": '"><script>', "layers": []}
    html = Report(document)._repr_html_()
    assert 'sandbox="allow-scripts"' in html
    assert "<script" not in html and '"><' not in html.partition("srcdoc=")[0]


def test_collapsed_routing_gets_advice() -> None:
    model = moezoo.build(CONFIG, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("classifier.weight"):
                parameter.zero_()
    ids = torch.randint(2, 384, (2, 9), generator=torch.Generator().manual_seed(0))
    document = moezoo.report(model, [{"input_ids": ids, "labels": ids}]).document
    said = " ".join(facts(document))
    assert "3 of 4 experts get no token" in said
    assert "capacity='dropless'" in said
    assert "100%" in table(HEADER, rows(document)) and advice(document["layers"])
    theirs = " ".join(advice(document["layers"], ours=False))
    assert "3 of 4 experts get no token. Train with output_router_logits=True" in theirs
    assert "capacity" not in theirs and "router_init" not in theirs


def test_bars_are_full_at_twice_the_mean_and_half_at_it() -> None:
    assert sparkline([0, 1, 2, 1]) == "▁▅█▅"
    assert sparkline([0, 0]) == ""
