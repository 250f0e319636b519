"""The routing report tells who is chosen, what would be dropped, and what to do about it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import moezoo
from moezoo import cli
from moezoo.report.routing import routing_report, sparkline
from moezoo.report.routing_page import advice, rows

CONFIG = moezoo.SwitchConfig(
    vocab_size=400, d_model=16, d_kv=4, d_ff=24, num_heads=2, num_layers=2, num_experts=4
)


def batches(count: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 384, (count, 2, 9), generator=generator)
    return [{"input_ids": row, "labels": row[:, :4]} for row in ids]


def test_a_hash_router_is_reported_as_its_table_says() -> None:
    model = moezoo.build(CONFIG, seed=0, router="hash").train()
    report = routing_report(model, batches(), str)
    assert model.training
    assert [layer.name for layer in report] == ["encoder.blocks.1.mlp", "decoder.blocks.1.mlp"]
    encoder = report[0]
    seen = torch.cat([batch["input_ids"].flatten() for batch in batches()])
    router = model.get_submodule(encoder.name).router
    expert = router.table[seen]
    assert encoder.stats.load == torch.bincount(expert, minlength=4).tolist()
    for number, pieces in enumerate(encoder.tokens):
        assert pieces
        assert all(int(router.table[int(piece)]) == number for piece in pieces)


def test_more_capacity_would_drop_less_and_enough_nothing() -> None:
    model = moezoo.build(CONFIG, seed=0)
    for layer in routing_report(model, batches(), str):
        shares = list(layer.dropped_at.values())
        assert shares == sorted(shares, reverse=True)
        assert layer.dropped_at[4.0] == 0.0


def test_soft_routing_is_reported_without_drops_and_tokens() -> None:
    model = moezoo.build(CONFIG, seed=0, router="soft", allow_noncausal=True)
    report = routing_report(model, batches(1), str)
    assert all(not layer.dropped_at and not layer.tokens for layer in report)
    assert len(rows(report)) == 2


def test_collapsed_routing_gets_advice() -> None:
    model = moezoo.build(CONFIG, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("classifier.weight"):
                parameter.zero_()
    said = " ".join(advice(routing_report(model, batches(), str)))
    assert "3 of 4 experts get no token" in said
    assert "capacity='dropless'" in said


def test_bars_are_full_at_twice_the_mean_and_half_at_it() -> None:
    assert sparkline([0, 1, 2, 1]) == "▁▅█▅"
    assert sparkline([0, 0]) == ""


def test_the_verb_prints_a_table_and_writes_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moezoo.save(moezoo.build(CONFIG, seed=0), tmp_path / "model")
    settings = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125}
    (tmp_path / "model/tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "text.txt").write_text("An expert is chosen by <its> router.\n" * 60)
    words = ["report", str(tmp_path / "model"), "--text", str(tmp_path / "text.txt")]
    words += "--batches 2 --batch-size 2 --length 32".split()
    page = tmp_path / "page.html"
    assert cli.main([*words, "--out", str(page)]) == 0
    assert "encoder.blocks.1.mlp" in capsys.readouterr().out
    assert page.read_text().count('class="strip"') == 2
    assert "http" not in page.read_text()
    assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found[0]["stats"]["offered"] == 2 * 2 * 32
    assert math.isclose(sum(found[0]["stats"]["load"]), 128)


def test_a_dense_model_has_nothing_to_report() -> None:
    model = moezoo.build(CONFIG, seed=0, num_experts=0)
    with pytest.raises(moezoo.MoezooError, match="no MoE layer"):
        routing_report(model, batches(1), str)


def test_the_verb_says_of_a_dense_model_what_it_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moezoo.save(moezoo.build(CONFIG, seed=0, num_experts=0), tmp_path / "model")
    assert cli.main(["report", str(tmp_path / "model")]) == 2
    assert "a dense model, which has no experts to report on" in capsys.readouterr().err


def test_findings_are_a_list_on_the_page(tmp_path: Path) -> None:
    from moezoo.report.page import write_page

    page = tmp_path / "page.html"
    write_page(page, title="t", lead="l", notes=["a < b", "c"], header=("a",), rows=[("b",)])
    assert "<ul><li>a &lt; b</li><li>c</li></ul>" in page.read_text()


def test_a_page_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    from moezoo.report.page import write_page

    with pytest.raises(moezoo.MoezooError, match="page was not written"):
        write_page(tmp_path / "no/page.html", title="", lead="", header=("a",), rows=[("b",)])
