"""Training over ranks is training in one process: steps, statistics, checkpoints, faults."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

import moezoo
from moezoo.errors import NonFiniteLoss, RanksDiffer, ResumeMismatch
from moezoo.functional.shards import local_of
from moezoo.parallel import mesh, shard
from moezoo.training import loop
from moezoo.training.checkpoints import checkpoints, restore, save_checkpoint
from moezoo.training.loop import fit, start
from moezoo.training.ranks import batch_of_all_ranks, of_rank, seed_of_step
from moezoo.training.recipes import TrainingRecipe
from moezoo.training.run import run_training
from tests.parallel.ranks import Claims, Ranks, apart, started
from tests.parallel.runs import (
    RECIPES,
    STEPS,
    far,
    measured,
    model,
    reference,
    rows,
    state,
    tensors,
    trained,
    write_references,
)

claims = Claims()
pytestmark = pytest.mark.dist
CLOSE = 1e-9  # float64; AdamW divides by the root of what is small


def _same_as_alone(ranks: Ranks, name: str, way: str, ep: int) -> None:
    settings, wanted = RECIPES[name], reference(ranks.folder, name)
    found = state(way, settings, ep=ep)
    assert far(trained(found, settings), wanted["records"]) < CLOSE
    assert far(measured(found), wanted["measured"]) < CLOSE
    for key, tensor in tensors(found).items():
        assert apart(tensor, wanted["tensors"][key]) < CLOSE, key


@claims.over(2, 4)
def six_steps_of_sharded_adamw(ranks: Ranks) -> None:
    _same_as_alone(ranks, "adamw", "shard", 2)


@claims.over(2, 4)
def six_steps_of_sharded_adafactor(ranks: Ranks) -> None:
    _same_as_alone(ranks, "adafactor", "shard", 2)


@claims.over(2)
def six_steps_of_divided_experts(ranks: Ranks) -> None:
    _same_as_alone(ranks, "adafactor", "experts", 2)


@claims.over(2)
def six_steps_of_copies(ranks: Ranks) -> None:
    _same_as_alone(ranks, "adamw", "copies", 1)


@claims.over(4)
def six_accumulated_steps(ranks: Ranks) -> None:
    _same_as_alone(ranks, "accumulated", "shard", 4)


@claims.over(2)
def accumulated_steps_under_ddp(ranks: Ranks) -> None:
    settings, wanted = RECIPES["accumulated"], reference(ranks.folder, "accumulated")
    wrapped = start(nn.parallel.DistributedDataParallel(model()), settings, steps=STEPS)
    assert far(trained(wrapped, settings), wanted["records"]) < CLOSE


@claims.over(2)
def a_checkpoint_is_written_by_two(ranks: Ranks) -> None:
    found = state("shard", RECIPES["adafactor"], ep=2)
    trained(found, RECIPES["adafactor"], until=3)
    save_checkpoint(found, ranks.folder / "two", {"a": 1})
    whole = tensors(found)
    if ranks.rank == 0:
        torch.save(whole, ranks.folder / "whole.pt")


@claims.over(4)
def four_go_on_with_the_same_bits(ranks: Ranks) -> None:
    found = state("shard", RECIPES["adafactor"], ep=2)
    restore(found, checkpoints(ranks.folder / "two")[-1], {"a": 1})
    whole = torch.load(ranks.folder / "whole.pt", weights_only=True)
    now = tensors(found)
    assert now.keys() == whole.keys()
    assert all(torch.equal(now[name], whole[name]) for name in whole)
    save_checkpoint(found, ranks.folder / "four", {"a": 1})
    with pytest.raises(ResumeMismatch, match="a is not what"):
        restore(found, checkpoints(ranks.folder / "two")[-1], {"a": 2})
    wanted = reference(ranks.folder, "adafactor")["records"][3:]
    assert far(trained(found, RECIPES["adafactor"]), wanted) < CLOSE


@claims.over(2)
def what_one_process_saved_goes_on(ranks: Ranks) -> None:
    found = state("shard", RECIPES["adamw"], ep=2)
    restore(found, checkpoints(ranks.folder / "one")[-1], {})
    wanted = reference(ranks.folder, "adamw")["records"][3:]
    assert far(trained(found, RECIPES["adamw"]), wanted) < CLOSE


@claims.over(2)
def a_nan_on_one_rank_is_one_of_the_step(ranks: Ranks) -> None:
    settings = RECIPES["adamw"]
    found = state("shard", settings, ep=2)
    trained(found, settings, until=1)
    before = tensors(found)
    handles = []
    if ranks.rank == 1:
        norm = found.model.decoder.final_norm
        handles.append(norm.register_forward_hook(lambda module, inputs, y: y * torch.nan))
    (record,) = fit(found, of_rank(rows), settings, steps=2, nonfinite="skip")
    assert record.skipped
    assert record.culprit == "output of decoder.final_norm"
    now = tensors(found)
    assert all(torch.equal(now[name], before[name]) for name in before)
    with pytest.raises(NonFiniteLoss, match=r"step 3: .*decoder\.final_norm"):
        fit(found, of_rank(rows), settings, steps=3)
    for handle in handles:
        handle.remove()
    assert not fit(found, of_rank(rows), settings, steps=4)[-1].skipped


@claims.over(2)
def a_nan_in_the_part_of_one_rank_is_one_of_the_step(ranks: Ranks) -> None:
    """A gradient that is not finite in weights which rank 1 alone holds."""
    found = state("shard", RECIPES["adamw"], ep=2)

    def spoilt(model: nn.Module, mesh: Any) -> None:
        if ranks.rank == 1:
            local_of(model.shared.weight.grad)[0, 0] = torch.nan

    before = tensors(found)
    with patch.object(loop, "average_gradients", spoilt):
        (record,) = fit(found, of_rank(rows), RECIPES["adamw"], steps=1, nonfinite="skip")
    assert record.skipped
    assert record.culprit == "gradient of shared.weight"
    now = tensors(found)
    assert all(torch.equal(now[name], before[name]) for name in before)


@claims.over(2)
def ranks_that_were_started_otherwise_say_so(ranks: Ranks) -> None:
    out, settings = ranks.folder / "differ", RECIPES["adamw"]
    with pytest.raises(RanksDiffer, match="seed of rank 1 is not that of rank 0"):
        run_training(model(), rows, settings, out, steps=1, facts={"seed": ranks.rank})
    other = model()
    with torch.no_grad():
        other.shared.weight += ranks.rank
    with pytest.raises(RanksDiffer, match="first weights of rank 1"):
        run_training(other, rows, settings, out, steps=1)

    def shifted(step: int) -> dict[str, torch.Tensor]:
        return rows(step + ranks.rank)

    with pytest.raises(RanksDiffer, match="a batch of rank 1"):
        run_training(model(), shifted, settings, out, steps=1)
    dist.barrier()
    assert not out.exists()


@claims.over(2)
def rank_0_alone_writes_and_a_run_goes_on(ranks: Ranks) -> None:
    out, settings = ranks.folder / "run", RECIPES["adamw"]
    for resumed in (False, True):
        divided = shard(model(), mesh(2, device="cpu"))
        done = run_training(
            divided,
            rows,
            settings,
            out,
            steps=4,
            held_out=rows,
            held_out_batches=1,
            evaluate_every=2,
            save_every=2,
            on_step=None if resumed else _stop_one(ranks),
        )
        assert done.interrupted is not resumed
        dist.barrier()
    steps = [line for line in (out / "metrics.jsonl").read_text().splitlines() if "loss" in line]
    assert len(steps) == 4
    assert [path.name for path in checkpoints(out / "checkpoints")] == [
        "step-00000002",
        "step-00000004",
    ]
    assert divided.router_losses.losses["z"].scope == "batch"


def _stop_one(ranks: Ranks) -> Any:
    """SIGTERM to rank 1 alone, in step 2."""

    def on_step(record: Any) -> None:
        if record.step == 2 and ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    return on_step


@claims.over(2)
def dropout_is_another_one_on_every_rank_and_in_every_step(ranks: Ranks) -> None:
    seeds = [seed_of_step(7, step) for step in range(3)]
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, seeds)
    assert len({seed for each in everyone for seed in each}) == 6
    settings = TrainingRecipe("adamw", 1e-3)
    first, again = (start(model(dropout_rate=0.5), settings, steps=2) for _ in range(2))
    assert trained(first, settings, until=2) == trained(again, settings, until=2)
    drawn = torch.rand(1)
    dist.all_gather_object(everyone, float(drawn))
    assert everyone[0] != everyone[1]


@claims.over(2)
def a_rank_may_evaluate_alone(ranks: Ranks) -> None:
    given = model(router_losses={n: {"coefficient": 1.0, "scope": "global"} for n in ("z",)})
    if ranks.rank == 0:
        with torch.no_grad():
            alone = given(**rows(0))
        assert torch.isfinite(alone.losses["z"])
    dist.barrier()


@claims.over(2)
def a_scope_that_is_said_is_kept(ranks: Ranks) -> None:
    losses = {"load_balance": {"coefficient": 0.1, "scope": "batch"}, "z": 0.1}
    given = model(router_losses=losses)
    with batch_of_all_ranks(given):
        scopes = {name: loss.scope for name, loss in given.router_losses.losses.items()}
    assert scopes == {"load_balance": "batch", "z": "global"}


GENERATIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 2},
    "uncached": {"use_cache": False},
}


def generated(made: nn.Module, rank: int, options: dict[str, Any]) -> torch.Tensor:
    """Two sources of a rank, whose answers are of another length than the other rank's."""
    batch, own = rows(3), slice(rank, rank + 2)
    ids, mask = batch["input_ids"][own], batch["attention_mask"][own]
    found: torch.Tensor = made.generate(ids, mask, max_new_tokens=(3, 9)[rank], **options)
    return found


@claims.over(2)
def generation_of_other_lengths_is_that_of_one_process(ranks: Ranks) -> None:
    for divided in (shard(model(), mesh(2, device="cpu")), state_of_experts()):
        divided.eval()
        for name, options in GENERATIONS.items():
            wanted = torch.load(ranks.folder / f"{name}.pt", weights_only=True)[ranks.rank]
            assert torch.equal(generated(divided, ranks.rank, options), wanted), name
        none = divided.generate(rows(3)["input_ids"][: ranks.rank], max_new_tokens=4)
        assert none.shape[0] == ranks.rank


def state_of_experts() -> nn.Module:
    return state("experts", RECIPES["adamw"], ep=2).model


def prepare(folder: Path) -> None:
    """What one process finds, for the ranks to compare with."""
    write_references(folder)
    saved = state("alone", RECIPES["adamw"])
    trained(saved, RECIPES["adamw"], until=3)
    save_checkpoint(saved, folder / "one", {})
    whole = model().eval()
    for name, options in GENERATIONS.items():
        torch.save([generated(whole, rank, options) for rank in range(2)], folder / f"{name}.pt")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    folder = tmp_path_factory.mktemp("ranks")
    prepare(folder)
    yield started(__name__, folder), folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize(("world", "claim"), claims.names())
def test_over_ranks(world: int, claim: str, outcomes: tuple[Any, Path]) -> None:
    assert not outcomes[0][world, claim], outcomes[0][world, claim]


def test_one_process_goes_on_from_what_four_wrote(outcomes: tuple[Any, Path]) -> None:
    folder = outcomes[1]
    found = state("alone", RECIPES["adafactor"])
    restore(found, checkpoints(folder / "four")[-1], {"a": 1})
    whole, now = torch.load(folder / "whole.pt", weights_only=True), tensors(found)
    assert now.keys() == whole.keys()
    assert all(torch.equal(now[name], whole[name]) for name in whole)
    wanted = reference(folder, "adafactor")["records"][3:]
    assert far(trained(found, RECIPES["adafactor"]), wanted) < CLOSE
    damaged = next((checkpoints(folder / "four")[-1] / "shards").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(moezoo.MoezooError, match="shards: cannot be read"):
        restore(found, checkpoints(folder / "four")[-1], {"a": 1})
