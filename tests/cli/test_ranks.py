"""The command line under torchrun: three verbs run over ranks, the others say that they do not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import moezoo
from moezoo import cli
from moezoo.cli.ranks import OVER_RANKS

ROOT = Path(__file__).parent.parent.parent
VERBS = [verb for verb in cli.available() if verb not in OVER_RANKS]


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("verb", VERBS)
def test_other_verbs_are_refused_by_name_and_once(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    as_rank(monkeypatch, 0)
    assert cli.main([verb]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"moezoo: {verb} runs in one process, not in 2.")
    assert said.count("\n") == 1
    as_rank(monkeypatch, 1)
    assert cli.main([verb]) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("ep", ["2"]),
        ("hybrid", []),
        ("precision", ["bfloat16"]),
        ("timeout", ["9"]),
        ("heartbeat", ["9"]),
    ],
)
@pytest.mark.parametrize("verb", OVER_RANKS)
def test_flags_of_ranks_are_refused_in_one_process(
    verb: str, flag: str, value: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = {
        "train": [str(tmp_path / "out"), "--steps", "1"],
        "finetune": ["nowhere", str(tmp_path / "out"), "--steps", "1"],
        "evaluate": ["nowhere"],
    }
    assert cli.main([verb, *words[verb], f"--{flag}", *value]) == 2
    assert f"--{flag} is for several ranks. Start with `torchrun" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_job_that_is_not_torchruns_runs_any_verb(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # a cluster may set this much
    monkeypatch.delenv("RANK", raising=False)
    assert cli.main(["list"]) == 0
    as_rank(monkeypatch, 0)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert cli.main(["list"]) == 0


FINETUNE = [
    "finetune", "model", "OUT", "--pairs", "pairs.jsonl", "--steps", "3", "--batch-size", "6",
    "--recipe", "small", "--dropout", "0", "--save-every", "2",
]  # fmt: skip
KILLED_ONCE = """
import os, signal, sys
from moezoo import cli
from moezoo.training import run

def saved_and_killed(state, *given, save=run.save_checkpoint):
    save(state, *given)
    if state.step == 2:
        os.kill(os.getpid(), signal.SIGKILL)

if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
    run.save_checkpoint = saved_and_killed
sys.exit(cli.main())
"""


def finetuned(folder: Path, out: str, *before: str, after: tuple[str, ...] = ()) -> tuple[str, str]:
    """What a run in OUT says and complains of, by this interpreter and what stands before it."""
    words = [out if word == "OUT" else word for word in FINETUNE]
    done = subprocess.run(
        [sys.executable, *before, *words, *after],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout.replace(out, "OUT"), done.stderr


@pytest.mark.dist
def test_torchrun_starts_again_after_a_lost_rank_and_ends_as_one_process_does(
    tmp_path: Path,
) -> None:
    tokenizer = moezoo.ByteTokenizer()
    config = moezoo.SwitchConfig(
        vocab_size=tokenizer.vocab_size, d_model=32, d_kv=8, d_ff=64, num_heads=4, num_layers=2,
        num_experts=4, capacity="dropless", dropout_rate=0.0,
    )  # fmt: skip
    moezoo.save(moezoo.build(config, seed=0), tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    pairs = [{"source": f"n {i % 7}" + "x" * (i % 5), "target": f"v {i % 7}"} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (tmp_path / "killed.py").write_text(KILLED_ONCE)
    alone, _ = finetuned(tmp_path, "one", "-m", "moezoo")
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    again = [*ranks, "--max-restarts", "1", "killed.py"]
    said, complained = finetuned(tmp_path, "two", *again, after=("--ep", "2", "--resume"))
    assert "moezoo: rank 0: step 3: a rank is lost" in complained
    _, held_out, end = alone.partition("step 3: held-out")
    assert held_out
    assert said.endswith(held_out + end)  # losses, metrics and answers, once
    lines = [
        [json.loads(line) for line in (tmp_path / out / "metrics.jsonl").read_text().splitlines()]
        for out in ("one", "two")
    ]
    for one, two in zip(*lines, strict=True):
        assert one.keys() == two.keys()
        for name in one.keys() & {"step", "loss", "gradient_norm", "held_out", "dropped", "tokens"}:
            assert two[name] == pytest.approx(one[name], rel=2e-4), name
    one, two = (moezoo.load(tmp_path / out / "model").state_dict() for out in ("one", "two"))
    assert all(abs(one[name] - two[name]).max() < 2e-3 for name in one)
    assert sorted(p.name for p in (tmp_path / "two" / "model").iterdir()) == sorted(
        p.name for p in (tmp_path / "one" / "model").iterdir()
    )
