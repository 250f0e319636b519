"""`moezoo info` counts what a checkpoint holds, by its headers, and knows the routers' defaults."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import moezoo
from moezoo import cli

SIZES = {"vocab_size": 61, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 2, "num_layers": 3}


@pytest.mark.parametrize("task", ["conditional_generation", "model", "encoder"])
@pytest.mark.parametrize("num_experts", [0, 4])
@pytest.mark.parametrize("family", ["t5", "v1.1", "umt5", "own tables"])
def test_info_counts_the_parameters_that_a_checkpoint_holds(
    task: str, num_experts: int, family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = moezoo.SwitchConfig(
        **SIZES,
        num_experts=num_experts,
        feed_forward_proj="gated-gelu" if family in ("v1.1", "umt5") else "relu",
        own_embeddings=("encoder", "decoder")[: 1 if task == "encoder" else 2]
        if family == "own tables"
        else (),
        tie_word_embeddings=family == "t5" or task == "model",
        position_bias_every_layer=family == "umt5",
    )
    model = moezoo.build(config, task=task, seed=0)
    moezoo.save(model, tmp_path / "model")
    assert cli.main(["info", str(tmp_path / "model"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["task"] == task


def test_info_of_a_dense_model_says_so_and_nothing_of_routers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["info", "t5-small"]) == 0
    said = capsys.readouterr().out
    assert "a dense model" in said
    assert "router" not in said


def test_info_of_a_checkpoint_imports_no_torch(tmp_path: Path) -> None:
    moezoo.save(moezoo.build(moezoo.SwitchConfig(**SIZES), seed=0), tmp_path / "t5")
    code = f"import sys\nfrom moezoo.cli import main\nmain(['info', {str(tmp_path / 't5')!r}])\n"
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
