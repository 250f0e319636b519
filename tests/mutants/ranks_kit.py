"""What several ranks promise, short enough to be run against every seeded bug of theirs."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

import moezoo
from moezoo.parallel import clip_grad_norm, expert_parallel, mean_gradients, mesh, shard
from moezoo.parallel.meeting import met
from moezoo.routers.base import Router
from tests.models.tiny import TINY
from tests.parallel.ranks import Claims, Ranks, apart, batch, gradients_agree, lively, started

claims = Claims()
pytestmark = pytest.mark.dist
SAME = {"router_losses": {}, "capacity": "dropless"}


@claims.over(4)
def unequal_rows_have_the_gradients_of_one_process(ranks: Ranks) -> None:
    torch.manual_seed(0)
    layer, grid = moezoo.SparseMLP(8, 16, 4, capacity="dropless").double(), mesh(2, device="cpu")
    sizes = (5, 2, 0, 3)
    x = torch.randn(sum(sizes), 8, dtype=torch.float64)
    mine = x[sum(sizes[: ranks.rank]) :][: sizes[ranks.rank]]
    spread = expert_parallel(copy.deepcopy(layer), grid)
    layer(x).square().sum().backward()
    (4 * spread(mine).square().sum()).backward()
    mean_gradients(spread, grid)
    gradients_agree(spread, layer, within=2e-14)


@claims.over(4)
def shards_have_the_norm_of_one_process(ranks: Ranks) -> None:
    given, alone = batch(), lively(**SAME)
    model = shard(lively(**SAME), mesh(2, device="cpu"))
    alone(**given.given()).loss.backward()
    model(**given.of(ranks.rank, 4).given()).loss.backward()
    gradients_agree(model, alone, within=2e-14)
    norm = nn.utils.clip_grad_norm_(alone.parameters(), 0.1)
    assert apart(clip_grad_norm(model, 0.1), norm) < 2e-14


@claims.over(4)
def copies_of_dense_weights_have_the_gradients_of_one_process(ranks: Ranks) -> None:
    given, alone = batch(), lively(**SAME)
    with patch.dict(os.environ, {"LOCAL_WORLD_SIZE": "2"}):  # whatever ep is
        model = shard(lively(**SAME), mesh(4, device="cpu"), hybrid=True)
    dense = model.shared.weight
    assert dense.device_mesh.mesh.tolist() == [[0, 1], [2, 3]]
    assert dense.placements == (Replicate(), Shard(0))
    alone(**given.given()).loss.backward()
    model(**given.of(ranks.rank, 4).given()).loss.backward()
    gradients_agree(model, alone, within=2e-14)
    norm = nn.utils.clip_grad_norm_(alone.parameters(), 0.1)
    assert apart(clip_grad_norm(model, 0.1), norm) < 2e-14


@claims.over(4)
def routers_keep_their_precision(ranks: Ranks) -> None:
    model = shard(lively(torch.float32, **SAME), mesh(2, device="cpu"), precision=torch.bfloat16)
    seen: set[torch.dtype] = set()

    def look(module: nn.Module, *_: object) -> None:
        seen.update(parameter.dtype for parameter in module.parameters())

    for router in (module for module in model.modules() if isinstance(module, Router)):
        router.register_forward_hook(look, prepend=True)  # before FSDP2 takes the weights away
    model(**batch().of(ranks.rank, 4).given())
    assert seen == {torch.float32}


@claims.over(4)
def weights_are_drawn_and_saved_as_by_any_other_ranks(ranks: Ranks) -> None:
    whole, folder = lively(torch.float32), ranks.folder
    if ranks.rank == 0:
        moezoo.save(whole, folder / "whole")
    dist.barrier()
    for ep in (2, 4):
        grid = mesh(ep, device="cpu")
        moezoo.save(shard(lively(torch.float32), grid), folder / f"shards {ep}")
        assert content(folder / f"shards {ep}") == content(folder / "whole")
        moezoo.save(moezoo.build(TINY, mesh=grid, seed=0), folder / f"drawn {ep}")
    assert content(folder / "drawn 2") == content(folder / "drawn 4")
    drawn = moezoo.load(folder / "drawn 2")
    for name, stack in drawn.named_parameters():
        if ".experts." in name:
            assert len({float(expert.detach().sum()) for expert in stack}) == 4


@claims.over(4)
def ddp_with_a_static_graph_trains_like_one_process(ranks: Ranks) -> None:
    given, alone, model = batch(), lively(**SAME), lively(**SAME)
    wrapped = DistributedDataParallel(model, static_graph=True)
    for _ in range(2):
        alone.zero_grad()
        wrapped.zero_grad()
        alone(**given.given()).loss.backward()
        wrapped(**given.of(ranks.rank, 4).given()).loss.backward()
        gradients_agree(model, alone, within=1e-12)


@claims.over(4)
def who_meets_again_finds_nothing_of_the_last_time(ranks: Ranks) -> None:
    store = dist.FileStore(str(ranks.folder / "meetings"), ranks.world)
    for _ in range(2):
        part = met(store, ranks.rank, ranks.world, 10.0)
        assert not part.check(["sign"])
        dist.barrier()
        part.set("sign", "of life")
        dist.barrier()


def content(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_the_claims_hold_over_ranks(tmp_path: Path) -> None:
    wrong = {claim: text for claim, text in started(__name__, tmp_path, timeout=15).items() if text}
    assert not wrong, wrong
