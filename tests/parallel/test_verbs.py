"""Verbs under torchrun with their options: what one process does, or refused before any work."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import pydoc_data.topics
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard

import moezoo
from moezoo import cli
from moezoo.training import evaluation, session, sharding, tensorboard
from moezoo.training import run as run_module
from moezoo.training.tasks import task
from tests.parallel.ranks import Claims, Ranks, started

claims = Claims(joined=False)
pytestmark = pytest.mark.dist
FAST = [
    "--steps", "2", "--batch-size", "5", "--recipe", "small", "--dropout", "0", "--save-every", "9",
]  # fmt: skip
PAIRS = ["--pairs", "pairs.jsonl", "--prefix", "say ", "--examples", "5"]
TEXT = ["--text", "text.txt", "--input-length", "24"]
RUNS: dict[str, list[str]] = {
    "plain": ["finetune", "sparse", "OUT", *PAIRS, *FAST],
    "taught": ["finetune", "dense", "OUT", *PAIRS, *FAST, "--teacher", "sparse"],
    "student": ["train", "OUT", *TEXT, *FAST, "--teacher", "sparse"],
}
SCORES: dict[str, list[str]] = {
    "all": ["evaluate", "sparse", *PAIRS[:-2], "--json"],
    "one": ["evaluate", "sparse", *PAIRS[:-1], "1"],
    "beams": ["evaluate", "sparse", *PAIRS, "--num-beams", "2"],
    "dense": ["evaluate", "dense", *PAIRS, "--json"],
}
_MOST = 32  # verbs, each of which meets in a store of its own
_verbs = {2: itertools.count(), 4: itertools.count(24)}


def answer(*words: str) -> tuple[int, str, str]:
    """A verb's exit code, output and complaints; targets and answers are short."""
    out, err = io.StringIO(), io.StringIO()
    short = patch.object(evaluation, "task", lambda name: replace(task(name), max_target=6))
    with short, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(words)
    return code, out.getvalue(), err.getvalue()


def over_ranks(ranks: Ranks, *words: str, node: int = 0) -> tuple[int, str, str]:
    """The same of a rank that torchrun starts, with its store; `node` ranks on each, or all."""
    numbers = {"RANK": ranks.rank, "LOCAL_RANK": ranks.rank, "WORLD_SIZE": ranks.world}
    environment = {name: str(value) for name, value in numbers.items()}
    environment |= {
        "LOCAL_WORLD_SIZE": str(node or ranks.world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": (ranks.folder / "ports").read_text().split()[next(_verbs[ranks.world])],
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    with patch.dict(os.environ, environment), contextlib.chdir(ranks.folder):
        return answer(*words)


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return moezoo.load(run / "model").state_dict()


def ran(ranks: Ranks, name: str, *words: str) -> tuple[str, Path]:
    """What the ranks together say of a run, and its directory; only the first one speaks."""
    place = f"{name}-ranks"
    given = [place if word == "OUT" else word for word in RUNS[name.split("+")[0]]]
    code, out, err = over_ranks(ranks, *given, *words)
    assert code == 0, err
    assert "Warning" not in err, err
    assert bool(out) is (ranks.rank == 0)
    return out.replace(place, "OUT"), ranks.folder / place


def is_the_run_of_one_process(ranks: Ranks, name: str, *words: str) -> None:
    said, run = ran(ranks, name, *words)
    if ranks.rank:
        return
    alone = ranks.folder / name.split("+")[0]
    assert said == (alone / "said.txt").read_text()
    for ours, theirs in zip(metrics(run), metrics(alone), strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() & {"loss", "gradient_norm", "held_out", "dropped", "tokens"}:
            assert ours[key] == pytest.approx(theirs[key], rel=2e-4), key
    found, wanted = weights(run), weights(alone)
    assert found.keys() == wanted.keys()
    assert all(abs(found[key] - wanted[key]).max() < 2e-3 for key in wanted)


@claims.over(2)
def a_teacher_is_heard_as_in_one_process(ranks: Ranks) -> None:
    is_the_run_of_one_process(ranks, "taught")
    is_the_run_of_one_process(ranks, "student")


@claims.over(2)
def products_in_bfloat16_train_weights_of_float32(ranks: Ranks) -> None:
    for name, ep in (("plain+half", "2"), ("plain+half dp", "1")):
        said, run = ran(ranks, name, "--precision", "bfloat16", "--ep", ep)
        if ranks.rank:
            continue
        plain = metrics(ranks.folder / "plain")
        for ours, theirs in zip(metrics(run), plain, strict=True):
            for key in ours.keys() & {"loss", "held_out"}:
                assert ours[key] != theirs[key]
                assert ours[key] == pytest.approx(theirs[key], rel=1e-2), key
        found, wanted = weights(run), weights(ranks.folder / "plain")
        assert {tensor.dtype for tensor in found.values()} == {torch.float32}
        stack = next(tensor for key, tensor in found.items() if ".experts." in key)
        assert not torch.equal(stack, stack.bfloat16())
        assert all(abs(found[key] - wanted[key]).max() < 1e-2 for key in wanted)


@claims.over(4)
def a_run_over_two_nodes_is_that_of_one_process(ranks: Ranks) -> None:
    """`hybrid`: begun by four, and gone on with by one; the tests below compare."""
    words = [word.replace("OUT", "hybrid-ranks") for word in RUNS["student"]]
    words[words.index("--save-every") + 1] = "1"
    del words[words.index("--teacher") :]
    kinds = ("--from", "dense", "--hybrid", "--ep", "1"), ("--from", "sparse", "--hybrid")
    seen: list[Any] = []
    divide = sharding.load_over_ranks

    def noted(*given: Any, **options: Any) -> Any:
        seen.append(divide(*given, **options))
        return seen[-1]

    for number, kind in enumerate(kinds):
        named = [word.replace("hybrid", f"hybrid{number}") for word in words]
        with patch.object(session, "load_over_ranks", noted):
            code, _, err = over_ranks(ranks, *named, *kind, node=2)
        assert code == 0, err
        shared = seen[-1].shared.weight
        assert shared.placements == (Replicate(), Shard(0))
        assert shared.device_mesh.mesh.tolist() == [[0, 1], [2, 3]]
    score = [*SCORES["all"], "--hybrid"]
    code, out, err = over_ranks(ranks, *score, node=2)
    assert code == 0, err
    if not ranks.rank:
        exact = json.loads((ranks.folder / "all.txt").read_text())
        assert json.loads(out) == pytest.approx(exact, rel=1e-6)
    code, out, err = over_ranks(ranks, *score)
    assert (code, out) == (2, "")
    assert "several nodes, found nodes of 4" in err


@claims.over(2)
def scores_are_those_of_one_process(ranks: Ranks) -> None:
    for name, words in SCORES.items():
        code, out, err = over_ranks(ranks, *words)
        assert code == 0, err
        wanted = (ranks.folder / f"{name}.txt").read_text()
        if ranks.rank:
            assert not out
        elif "--json" in words:
            assert json.loads(out) == pytest.approx(json.loads(wanted), rel=1e-6)
        else:
            assert out == wanted
    code, out, err = over_ranks(ranks, *SCORES["all"], "--precision", "bfloat16")
    assert code == 0, err
    if not ranks.rank:
        exact = json.loads((ranks.folder / "all.txt").read_text())
        half = json.loads(out)
        assert half["cross_entropy"] != exact["cross_entropy"]
        assert half["cross_entropy"] == pytest.approx(exact["cross_entropy"], rel=1e-2)


class FakeWriter:
    """Keeps what a SummaryWriter is told: not everybody who runs the tests has tensorboard."""

    def __init__(self, made: list[Any], folder: str, purge_step: int) -> None:
        self.folder, self.purge_step, self.closed = folder, purge_step, False
        self.scalars: list[tuple[str, float, int]] = []
        made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def close(self) -> None:
        self.closed = True


@claims.over(2)
def one_rank_writes_scalars_or_all_say_what_is_missing(ranks: Ranks) -> None:
    made: list[FakeWriter] = []
    with patch.object(tensorboard, "summary_writer", lambda: partial(FakeWriter, made)):
        with patch.object(session, "summary_writer"), patch.object(run_module, "summary_writer"):
            _, run = ran(ranks, "plain+board", "--tensorboard")
    assert [writer.folder for writer in made] == [f"{run.name}/tensorboard"] * (not ranks.rank)
    if made:
        rows = [row for row in metrics(run) if "loss" in row]
        found = [(step, value) for name, value, step in made[0].scalars if name == "loss"]
        assert found == [(row["step"], row["loss"]) for row in rows]
        assert made[0].closed
    name = "plain+none"
    words = [name if word == "OUT" else word for word in RUNS["plain"]]
    deaf = ["--heartbeat", "0"]  # who is slower hears from the other one what is missing there
    absent = patch.dict(sys.modules, {"torch.utils.tensorboard": None})
    read = patch.object(session, "load_over_ranks", side_effect=AssertionError("it was read"))
    with absent, read:
        code, out, err = over_ranks(ranks, *words, "--tensorboard", *deaf)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"moezoo: rank {ranks.rank}: --tensorboard needs tensorboard")


@claims.over(2)
def what_cannot_be_is_refused_before_anything_is_written(ranks: Ranks) -> None:
    scratch = ["train", "no", "--config", "config.json", *TEXT, *FAST]
    for words, reason in [
        ([*scratch, "--ep", "3"], "bad ep; expected a divisor of 2 ranks, found 3"),
        ([*scratch, "--ep", "0"], "bad ep; expected a divisor of 2 ranks, found 0"),
        ([*scratch, "--hybrid"], "hybrid divides dense weights within a node"),
        ([*scratch, "--watch"], "--watch is for one process. Leave it out."),
        (["finetune", "sparse", "no", *PAIRS, *FAST, "--watch"], "--watch is for one process."),
        ([*scratch, "--compile"], "--compile is for one process. Leave it out."),
        (["generate", "sparse", "hello"], "generate runs in one process, not in 2."),
        (["report", "sparse", "--text", "text.txt"], "report runs in one process, not in 2."),
    ]:
        code, out, err = over_ranks(ranks, *words)
        assert (code, out) == (2, ""), err
        assert reason in err or (ranks.rank and not err), err
        assert err.count("\n") <= 1
    assert not (ranks.folder / "no").exists()


def prepare(folder: Path) -> None:
    """Models, data, and what one process does with them."""
    tokenizer = moezoo.ByteTokenizer()
    config = moezoo.SwitchConfig(
        vocab_size=tokenizer.vocab_size, d_model=32, d_kv=8, d_ff=64, num_heads=4, num_layers=2,
        num_experts=4, capacity="dropless", dropout_rate=0.0,
    )  # fmt: skip
    for name, fields in (("sparse", {}), ("dense", {"num_experts": 0, "router_losses": {}})):
        model = moezoo.build(config, seed=0, **fields)
        model.generation = model.generation.replace(min_new_tokens=3)  # it would say nothing
        moezoo.save(model, folder / name)
        tokenizer.save(folder / name)
    (folder / "config.json").write_text(config.to_json())
    topics: dict[str, str] = pydoc_data.topics.topics
    (folder / "text.txt").write_text("\n\n".join(topics[name] for name in sorted(topics)[:25]))
    pairs = [{"source": f"n {i % 7}" + "x" * (i % 5), "target": f"v {i % 7}"} for i in range(31)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    with contextlib.chdir(folder):
        for name, words in RUNS.items():
            code, out, err = answer(*[name if word == "OUT" else word for word in words])
            assert code == 0, err
            Path(name, "said.txt").write_text(out.replace(name, "OUT"))
        for name, words in SCORES.items():
            code, out, err = answer(*words)
            assert code == 0, err
            Path(f"{name}.txt").write_text(out)


def meeting_points(folder: Path) -> list[dist.TCPStore]:
    """As torchrun's agent has one; who holds them ends them."""
    stores = [
        dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in range(_MOST)
    ]
    (folder / "ports").write_text(" ".join(str(store.port) for store in stores))
    return stores


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> Iterator[dict[tuple[int, str], str]]:
    prepare(folder)
    stores = meeting_points(folder)
    yield started(__name__, folder)
    del stores


@pytest.mark.parametrize(("world", "claim"), claims.names())
def test_over_ranks(world: int, claim: str, outcomes: dict[tuple[int, str], str]) -> None:
    assert not outcomes[world, claim], outcomes[world, claim]


@pytest.mark.parametrize("number", [0, 1])
def test_one_process_goes_on_from_two_nodes(
    number: int, outcomes: dict[tuple[int, str], str], folder: Path
) -> None:
    """Of four ranks' checkpoint of the first step it makes the second one as they did."""
    run = folder / f"hybrid{number}-ranks"
    wanted, trained = metrics(run), weights(run)
    name = ("dense", "sparse")[number]
    words = ["train", str(run), *TEXT, *FAST, "--from", name, "--resume-from", "1"]
    with contextlib.chdir(folder):
        code, _, err = answer(*words)
    assert code == 0, err
    for ours, theirs in zip(metrics(run), wanted, strict=True):
        for key in ours.keys() & {"loss", "gradient_norm", "held_out", "tokens"}:
            assert ours[key] == pytest.approx(theirs[key], rel=2e-4), key
    again = weights(run)
    assert all(abs(again[key] - trained[key]).max() < 2e-3 for key in trained)
    alone = folder / f"alone{number}"
    with contextlib.chdir(folder):
        code, _, err = answer("train", str(alone), *TEXT, *FAST, "--from", name)
    assert code == 0, err
    for ours, theirs in zip(wanted, metrics(alone), strict=True):
        for key in ours.keys() & {"loss", "gradient_norm", "held_out", "tokens"}:
            assert ours[key] == pytest.approx(theirs[key], rel=2e-4), key
