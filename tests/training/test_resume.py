"""A run that is stopped, killed or broken goes on bit for bit, or says why it cannot."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import moezoo
from moezoo.training.checkpoints import checkpoints
from moezoo.training.loop import StepRecord
from moezoo.training.recipes import TrainingRecipe
from moezoo.training.run import RunResult, run_training
from tests.training.test_loop import batches
from tests.training.text import small_model

SETTINGS = TrainingRecipe(learning_rate=1e-3, schedule="inverse_sqrt", warmup=3)
STEPS = 12


def noisy_model() -> torch.nn.Module:
    """Dropout and jitter draw random numbers that a resumed run must draw again."""
    return small_model(dropout_rate=0.1, router={"name": "switch", "jitter": 0.01})


def train(directory: Path, *, until: int = STEPS, **options: object) -> RunResult:
    def maybe_stop(record: StepRecord) -> None:
        if record.step == until < STEPS:
            os.kill(os.getpid(), signal.SIGTERM)

    torch.manual_seed(7)
    return run_training(
        noisy_model(),
        batches(),
        SETTINGS,
        directory,
        steps=STEPS,
        held_out=batches(seed=1),
        held_out_batches=1,
        save_every=4,
        on_step=maybe_stop,
        **options,
    )


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return moezoo.load(checkpoints(directory / "checkpoints")[-1] / "model").state_dict()


def assert_same(one: Path, two: Path) -> None:
    expected = weights(two)
    for name, tensor in weights(one).items():
        assert torch.equal(tensor, expected[name]), name
    rows = []
    for directory in (one, two):
        lines = (directory / "metrics.jsonl").read_text().splitlines()
        rows.append([{k: v for k, v in json.loads(x).items() if k != "seconds"} for x in lines])
    assert rows[0] == rows[1]


@pytest.mark.parametrize("until", [1, 4, 7])
def test_a_terminated_run_saves_and_goes_on_bit_for_bit(until: int, tmp_path: Path) -> None:
    train(tmp_path / "whole")
    first = train(tmp_path / "parts", until=until)
    assert first.interrupted
    assert first.state.step == until
    second = train(tmp_path / "parts")
    assert not second.interrupted
    assert second.state.step == STEPS
    assert_same(tmp_path / "parts", tmp_path / "whole")


KILLED = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from tests.training.test_resume import train
train(Path(sys.argv[1]))
"""


def killed_and_resumed(directory: Path, delays: list[float]) -> None:
    """Start a run in a process of its own, kill -9 it after each delay, then let it finish."""
    command = [sys.executable, "-c", KILLED, str(directory)]
    for delay in delays:
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 60
            while not (directory / "metrics.jsonl").exists() and time.monotonic() < deadline:
                if process.poll() is not None:
                    break
                time.sleep(0.01)
            time.sleep(delay)
            process.kill()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


def test_a_run_killed_at_any_moment_goes_on_bit_for_bit(tmp_path: Path) -> None:
    killed_and_resumed(tmp_path / "whole", [])
    killed_and_resumed(tmp_path / "killed", [0.02, 0.3, 0.15])
    assert_same(tmp_path / "killed", tmp_path / "whole")


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
