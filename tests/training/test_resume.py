"""A run that is stopped, killed or broken goes on bit for bit, or says why it cannot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moezoo
from moezoo.training.checkpoints import checkpoints
from moezoo.training.run import run_training
from tests.training.runs import SETTINGS, STEPS, differences, noisy_model, train, weights
from tests.training.test_loop import batches


@pytest.mark.parametrize("until", [1, 4, 7])
def test_a_terminated_run_saves_and_goes_on_bit_for_bit(until: int, tmp_path: Path) -> None:
    train(tmp_path / "whole")
    first = train(tmp_path / "parts", until=until)
    assert first.interrupted
    assert first.state.step == until
    second = train(tmp_path / "parts")
    assert not second.interrupted
    assert second.state.step == STEPS
    assert not differences(tmp_path / "parts", tmp_path / "whole")


ROOT = Path(__file__).parent.parent.parent


def test_a_run_killed_at_any_moment_goes_on_bit_for_bit() -> None:
    """`python -m tests.training.kills 50` does it fifty times."""
    command = [sys.executable, "-m", "tests.training.kills", "3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("3 of 3 continuations bit-exact")


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    train(tmp_path, until=4)
    with pytest.raises(moezoo.MoezooError, match="learning_rate|recipe"):
        run_training(
            noisy_model(),
            batches(),
            SETTINGS.with_changes(learning_rate=5e-4),
            tmp_path,
            steps=STEPS,
        )
    with pytest.raises(moezoo.MoezooError, match="data"):
        train(tmp_path, facts={"data": "other"})


def test_a_nan_never_replaces_the_last_good_checkpoint(tmp_path: Path) -> None:
    train(tmp_path, until=8)
    good = weights(tmp_path)
    bad = noisy_model()
    bad.encoder.final_norm.register_forward_hook(lambda m, i, o: o * float("nan"))
    with pytest.raises(moezoo.MoezooError, match="step 9"):
        run_training(bad, batches(), SETTINGS, tmp_path, steps=STEPS)
    assert all(torch.equal(t, good[n]) for n, t in weights(tmp_path).items())


def test_a_corrupt_or_newer_checkpoint_is_named(tmp_path: Path) -> None:
    train(tmp_path, until=4)
    newest = checkpoints(tmp_path / "checkpoints")[-1]
    facts = json.loads((newest / "training.json").read_text())
    (newest / "training.json").write_text(json.dumps(facts | {"format": 99}))
    with pytest.raises(moezoo.MoezooError, match="newer"):
        train(tmp_path)
    (newest / "training.json").write_text(json.dumps(facts))
    content = (newest / "training.pt").read_bytes()
    (newest / "training.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(moezoo.MoezooError, match="training.pt"):
        train(tmp_path)


def test_old_checkpoints_are_removed_and_two_stay(tmp_path: Path) -> None:
    train(tmp_path)
    assert [p.name for p in checkpoints(tmp_path / "checkpoints")] == [
        "step-00000008",
        "step-00000012",
    ]
