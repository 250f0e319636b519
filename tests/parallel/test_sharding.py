"""FSDP2 around divided experts, and DDP: what one process computes, float32 where it matters."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

import moezoo
from moezoo.errors import ConfigError
from moezoo.functional.shards import is_sharded
from moezoo.models.block import Block
from moezoo.models.linear import Linear
from moezoo.models.norm import RMSNorm
from moezoo.parallel import clip_grad_norm, expert_parallel, mesh, shard
from moezoo.routers.base import Router
from tests.parallel.ranks import (
    Claims,
    Ranks,
    apart,
    batch,
    gradients_agree,
    lively,
    meshes,
    started,
    whole_of,
)

claims = Claims()
pytestmark = pytest.mark.dist
EXACT = 2e-14
SAME: dict[str, Any] = {"router_losses": {}, "capacity": "dropless"}


def stepped(model: nn.Module, given: dict[str, torch.Tensor], clip: Any) -> list[torch.Tensor]:
    """Three clipped steps; the norms. Without Adam's root, a rounding stays one."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
    norms = []
    for _ in range(3):
        model(**given).loss.backward()
        norms.append(clip(model))
        optimizer.step()
        optimizer.zero_grad()
    return norms


@claims.over(2, 4)
def gradients_norms_and_steps_are_those_of_one_process(ranks: Ranks) -> None:
    given = batch()
    mine = given.of(ranks.rank, ranks.world).given()
    alone = lively(**SAME)
    alone(**given.given()).loss.backward()
    plain = lively(**SAME)
    norms = stepped(plain, given.given(), lambda m: nn.utils.clip_grad_norm_(m.parameters(), 0.1))
    assert min(norms) > 0.2  # every step is clipped
    for grid in [*meshes(ranks), mesh(1, device="cpu")]:
        model = shard(lively(**SAME), grid)
        model(**mine).loss.backward()
        gradients_agree(model, alone, within=EXACT)
        model.zero_grad()
        ours = stepped(model, mine, lambda m: clip_grad_norm(m, 0.1))
        for one, other in zip(ours, norms, strict=True):
            assert apart(one, other) < 1e-12
        for name, parameter in plain.named_parameters():
            assert apart(whole_of(model.get_parameter(name)), parameter.detach()) < 1e-11, name


@claims.over(4)
def experts_lie_along_both_dimensions_of_the_mesh(ranks: Ranks) -> None:
    model = shard(lively(), mesh(2, device="cpu"))
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        expected = (Shard(1), Shard(0)) if ".experts." in name else (Shard(0),)
        assert parameter.placements == expected, name
        assert ".experts." not in name or parameter.to_local().numel() * 4 == parameter.numel()
    with pytest.raises(ConfigError, match="neither width of an expert"):
        shard(lively(d_model=15, d_ff=9), mesh(2, device="cpu"))


@claims.over(2)
def weights_that_are_kept_and_recomputed_blocks_change_nothing(ranks: Ranks) -> None:
    given = batch()
    alone = lively(**SAME)
    alone(**given.given()).loss.backward()
    for reshard in (False, True):
        model = shard(lively(**SAME), mesh(2, device="cpu"), reshard=reshard)
        model.gradient_checkpointing(reshard)
        for _ in range(2):
            model.zero_grad()
            model(**given.of(ranks.rank, 2).given()).loss.backward()
        gradients_agree(model, alone, within=EXACT)


@claims.over(2, 4)
def routers_and_norms_compute_in_float32_under_a_policy_of_bfloat16(ranks: Ranks) -> None:
    given = batch().of(ranks.rank, ranks.world)
    reference = lively(torch.float32, **SAME)
    for grid, again in [(grid, again) for grid in meshes(ranks) for again in (False, True)]:
        model = shard(lively(torch.float32, **SAME), grid, precision=torch.bfloat16)
        model.gradient_checkpointing(again)
        seen = {"wide": set(), "linear": set()}
        for module in model.modules():
            if isinstance(module, (RMSNorm, Router)):
                module.register_forward_hook(partial(_note, seen["wide"]), prepend=True)
            elif type(module) is Linear:
                module.register_forward_hook(partial(_note, seen["linear"]), prepend=True)
        for _ in range(2):
            output = model(**given.given())
            output.loss.backward()
        assert seen == {"wide": {torch.float32}, "linear": {torch.bfloat16}}
        assert {routing.probs.dtype for routing in output.routing} == {torch.float32}
        assert output.logits.dtype == torch.bfloat16
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
        exact = reference(**given.given()).logits
        assert float((output.logits - exact).abs().mean() / exact.abs().mean()) < 0.1


def _note(seen: set[torch.dtype], module: nn.Module, inputs: Any, output: Any) -> None:
    seen.add(next(module.parameters()).dtype)


@claims.over(2)
def generation_over_shards_gives_the_tokens_of_one_process(ranks: Ranks) -> None:
    ids = batch().of(ranks.rank, 2).ids
    alone = lively(torch.float32, **SAME).eval()
    for dispatcher in ("alltoall", "allgather"):
        divided = expert_parallel(
            lively(torch.float32, **SAME).eval(), mesh(2, device="cpu"), dispatcher=dispatcher
        )
        model = shard(divided, mesh(2, device="cpu"))
        for options in ({}, {"num_beams": 2}):
            options = {"max_new_tokens": 4, "min_new_tokens": 4, **options}
            assert torch.equal(model.generate(ids, **options), alone.generate(ids, **options))


@claims.over(2)
def ddp_with_a_static_graph_trains_like_one_process(ranks: Ranks) -> None:
    given = batch()
    mine = given.of(ranks.rank, 2).given()
    alone, model = lively(**SAME), lively(**SAME)
    wrapped = DistributedDataParallel(model, static_graph=True)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (alone, model)]
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        alone(**given.given()).loss.backward()
        wrapped(**mine).loss.backward()
        gradients_agree(model, alone, within=1e-12)
        for optimizer in optimizers:
            optimizer.step()


@claims.over(2)
def what_torch_itself_shards_by_block_is_exact(ranks: Ranks) -> None:
    """As accelerate and Trainer wrap: every block, then the model; scalars are divided too."""
    given, grid = batch(), mesh(1, device="cpu")
    cases: list[dict[str, Any]] = [
        {},
        {"position_bias_every_layer": True},
        {"router": "soft", "group": "sequence", "allow_noncausal": True},
        {"router": "cosine"},
    ]
    for overrides in cases:
        overrides = {**SAME, **overrides}
        alone, model = lively(**overrides), lively(**overrides)
        alone(**given.given()).loss.backward()
        for block in [m for m in model.modules() if isinstance(m, Block)]:
            fully_shard(block, mesh=grid["dp"])
        fully_shard(model, mesh=grid["dp"])
        model(**given.of(ranks.rank, 2).given()).loss.backward()
        gradients_agree(model, alone, within=EXACT)


@claims.over(2)
def what_needs_all_weights_is_refused_by_name(ranks: Ranks) -> None:
    grid = mesh(2, device="cpu")
    model = shard(lively(), grid)
    with pytest.raises(ConfigError, match="the model is sharded already"):
        shard(model, grid)
    with pytest.raises(ConfigError, match="not a T5 or Switch model"):
        shard(moezoo.SparseMLP(8, 16, 4), grid)
    with pytest.raises(ConfigError, match="bad precision"):
        shard(lively(), grid, precision=torch.float32)


@claims.over(1)
def a_mesh_of_one_rank_leaves_the_model_as_it_is(ranks: Ranks) -> None:
    model = lively()
    assert shard(model, mesh(device="cpu")) is model
    assert not is_sharded(model) and not isinstance(model, FSDPModule)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[int, str], str]]:
    yield started(__name__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(("world", "claim"), claims.names(), ids=lambda x: str(x))
def test_over_ranks(world: int, claim: str, outcomes: dict[tuple[int, str], str]) -> None:
    assert not outcomes[world, claim], outcomes[world, claim]
