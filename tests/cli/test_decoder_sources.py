"""Decoders of transformers named to verbs: what `info` counts, and which directories none reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import moezoo
from moezoo import cli
from tests.conversion.decoders import dense_decoder, loaded


@pytest.mark.parametrize("family", ["llama, scaled and tied", "qwen2", "phi3", "granitemoehybrid"])
def test_info_counts_what_a_decoder_holds(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = dense_decoder(tmp_path / "dense", family)
    plan = moezoo.upcycle(source, tmp_path / "moe", num_experts=4).plan
    AutoModelForCausalLM.from_pretrained(tmp_path / "moe").save_pretrained(
        tmp_path / "again", max_shard_size="20KB"
    )
    for name, experts, chosen in (("dense", 0, 0), ("moe", 4, 2), ("again", 4, 2)):
        assert cli.main(["info", str(tmp_path / name), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        count = sum(p.numel() for p in loaded(tmp_path / name).parameters())
        assert found["parameters"] == count
        assert found["active_parameters"] == (plan.active_parameters if experts else count)
        assert (found["num_experts"], found["experts_per_token"]) == (experts, chosen)
        assert found["sparse_layers"] == ([0, 1] if experts else [])
    assert cli.main(["info", str(tmp_path / "dense")]) == 0
    assert "none: a dense model" in capsys.readouterr().out
    assert cli.main(["info", str(tmp_path / "moe"), "--length", "9"]) == 2
    assert "not counted of a decoder" in capsys.readouterr().err
    assert cli.main(["info", str(tmp_path / "moe")]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["experts", "per", "token", "2"] in rows


def test_info_of_a_decoder_imports_no_torch(tmp_path: Path) -> None:
    source = dense_decoder(tmp_path / "dense")
    code = f"import sys\nfrom moezoo.cli import main\nmain(['info', {str(source)!r}])\n"
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    "words",
    [
        ["info"],
        ["plan", "--experts", "2"],
        ["upcycle", "OUT", "--experts", "2"],
        ["downcycle", "OUT"],
        ["grow", "OUT"],
        ["export", "OUT", "--dtype", "bfloat16"],
        ["verify", "--against", "OUT"],
        ["report", "--text", "OUT"],
    ],
)
def test_a_plugged_decoder_is_named_as_such(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(dense_decoder(tmp_path / "dense"))
    moezoo.plug(model, "model.layers.*.mlp", moezoo.sparse(2))
    moezoo.save(model, tmp_path / "plugged")
    rest = [str(tmp_path / "out") if word == "OUT" else word for word in words[1:]]
    if words[0] == "report":
        (tmp_path / "out").write_text("a text")
    assert cli.main([words[0], str(tmp_path / "plugged"), *rest]) == 2
    said = capsys.readouterr().err
    assert "a model that moezoo.plug has put experts into" in said and "moezoo.load(DIR)" in said
    assert words[0] == "report" or not (tmp_path / "out").exists()
