"""Experts of other kinds over ranks: with biases, in float32, large; dense weights in copies."""

from __future__ import annotations

import copy
import gc
import os
import resource
import sys
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import Replicate, Shard

import moezoo
from moezoo.errors import ConfigError
from moezoo.functional.shards import local_of
from moezoo.layer import MoE
from moezoo.parallel import clip_grad_norm, expert_parallel, mean_gradients, mesh, shard, traffic
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
EXACT, EXACT_32 = 2e-14, 2e-6
SAME: dict[str, Any] = {"router_losses": {}, "capacity": "dropless"}
LARGE = moezoo.SwitchConfig(
    vocab_size=64, d_model=256, d_kv=32, d_ff=512, num_heads=2, num_layers=4, num_decoder_layers=4,
    num_experts=8, encoder_sparse_layers="all", decoder_sparse_layers="all",
)  # fmt: skip
SMALL: dict[str, Any] = {"d_model": 32, "d_ff": 64}


def most_held() -> int:
    """Bytes that this process has held at most, pages of files that it has read among them."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@claims.over(2)
def loading_and_building_need_a_share_and_a_tensor(ranks: Ranks) -> None:
    """First of all, because the most that a process has held only grows."""
    grid, large = mesh(2, device="cpu"), ranks.folder / "large"
    moezoo.load(ranks.folder / "small", mesh=grid)  # what code needs once
    moezoo.build(LARGE, mesh=grid, seed=0, **SMALL)
    whole, before = (large / "model.safetensors").stat().st_size, most_held()
    limit = whole // 2 + 8 * 256 * 512 * 4 + whole // 8  # a stack; and what else there is
    assert limit < 3 * whole // 4
    for make in (partial(moezoo.load, large), partial(moezoo.build, LARGE, seed=0)):
        model = make(mesh=grid)
        held = sum(local_of(parameter).nbytes for parameter in model.parameters())
        assert held == pytest.approx(whole / 2, rel=0.01)
        grown = most_held() - before
        assert held // 2 < grown < limit, (make.func, grown, held, limit)
        del model
        gc.collect()  # a module is a cycle


class Block(nn.Module):
    """A residual MLP of somebody else, with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


def plugged(**options: Any) -> nn.Module:
    """Two blocks whose MLPs are experts with biases, of weights that vary."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block()).double()
    made = moezoo.plug(model, "*.mlp", moezoo.sparse(4, **options), mask=False, causal=False)
    assert made == ["0.mlp", "1.mlp"]
    return varied(model)


def varied(model: nn.Module) -> nn.Module:
    source = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=source, dtype=torch.float64)
        parameter.data.copy_(0.5 * noise)
    return model.train()


def gated(**options: Any) -> nn.Module:
    experts = {"name": "stacked", "bias": True}
    layer = moezoo.SparseMLP(8, 16, 4, activation="gated-gelu", experts=experts, **options)
    return varied(layer.double())


@claims.over(2, 4)
def stacks_with_biases_equal_those_of_one_process(ranks: Ranks) -> None:
    every = torch.randn(ranks.world, 12, 8, generator=torch.Generator().manual_seed(1)).double()
    for make in (plugged, gated):
        for options in ({"capacity": "dropless"}, {"capacity": "first_come", "group": 4}):
            alone = make(**options)
            biases = [name for name, _ in alone.named_parameters() if "_bias" in name]
            assert len(biases) in (3, 4), biases
            whole = alone(every)
            whole.square().mean().backward()
            for grid in meshes(ranks):
                for dispatcher in ("alltoall", "allgather"):
                    model = expert_parallel(make(**options), grid, dispatcher=dispatcher)
                    ours = model(every[ranks.rank])
                    assert apart(ours, whole[ranks.rank]) < EXACT, (make, options)
                    ours.square().mean().backward()
                    mean_gradients(model, grid)
                    gradients_agree(model, alone, within=EXACT)


@claims.over(2)
def in_half_precision_biases_are_weighed_too(ranks: Ranks) -> None:
    for make in (plugged, gated):
        alone = make(capacity="dropless").half()
        x = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(1)).half()
        model = expert_parallel(copy.deepcopy(alone), mesh(2, device="cpu"))
        with torch.no_grad():
            assert torch.equal(model(x[ranks.rank]), alone(x)[ranks.rank])


@claims.over(2, 4)
def in_float32_values_gradients_and_bytes_are_the_least(ranks: Ranks) -> None:
    given = batch()
    for overrides in ({}, {"router": {"name": "top_k", "k": 2}}):
        alone = lively(torch.float32, **SAME, **overrides)
        whole = alone(**given.given())
        whole.loss.backward()
        for grid in meshes(ranks):
            model = expert_parallel(lively(torch.float32, **SAME, **overrides), grid)
            with traffic() as sent:
                output = model(**given.of(ranks.rank, ranks.world).given())
            rows = slice(ranks.rank * 8 // ranks.world, (ranks.rank + 1) * 8 // ranks.world)
            assert apart(output.logits, whole.logits[rows]) < EXACT_32
            is_least(sent.rows, [r.assignment for r in output.routing], grid, width=16)
            with traffic() as back:
                output.loss.backward()
            assert (back.rows, back.counts) == (sent.rows, 0)
            mean_gradients(model, grid)
            gradients_agree(model, alone, within=EXACT_32)
    layer = expert_parallel(gated(capacity="dropless").float(), meshes(ranks)[-1])
    with traffic() as sent:  # a bias stays where it is
        _, routing = layer.moe(torch.randn(11, 8))
    is_least(sent.rows, [routing.assignment], meshes(ranks)[-1], width=8)


def is_least(sent: int, assignments: list[Any], grid: Any, *, width: int) -> None:
    """Each row for another rank, of float32, once there and once back."""
    experts, ep = 4, grid["ep"].size()
    place = grid["ep"].get_local_rank()
    away = sum(
        int(((each.expert // (experts // ep) != place) & each.kept).sum()) for each in assignments
    )
    counted = torch.tensor([away * 2 * width * 4, sent])
    dist.all_reduce(counted, group=grid["ep"].get_group())
    assert int(counted[0]) == int(counted[1]) > 0


@claims.over(4)
def dense_weights_may_be_copied_along_dp(ranks: Ranks) -> None:
    given, alone, grid = batch(), lively(**SAME), mesh(2, device="cpu")
    alone(**given.given()).loss.backward()
    model = shard(lively(**SAME), grid, hybrid=True)
    assert isinstance(model, FSDPModule)
    for name, parameter in model.named_parameters():
        expected = (Shard(1), Shard(0)) if ".experts." in name else (Replicate(), Shard(0))
        assert parameter.placements == expected, name
    with patch.dict(os.environ, {"LOCAL_WORLD_SIZE": "2"}):  # whatever ep is
        for over in [mesh(ep, device="cpu") for ep in (1, 4)] * 2:
            by_node = shard(lively(**SAME), over, hybrid=True)
            dense = by_node.shared.weight
            assert dense.placements == (Replicate(), Shard(0))
            assert dense.device_mesh.mesh.tolist() == [[0, 1], [2, 3]]
            by_node(**given.of(ranks.rank, 4).given()).loss.backward()
            gradients_agree(by_node, alone, within=EXACT)
    for size, found in (("4", "nodes of 4"), ("1", "nodes of 1, 1, 1, 1"), ("3", "nodes of 3, 1")):
        refused = pytest.raises(ConfigError, match=f"hybrid divides .* found {found}")
        with patch.dict(os.environ, {"LOCAL_WORLD_SIZE": size}), refused:
            shard(lively(**SAME), grid, hybrid=True)
    target = ranks.folder / "hybrid"
    moezoo.save(model, target)
    saved = moezoo.load(target).state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in lively().state_dict().items())
    model(**given.of(ranks.rank, 4).given()).loss.backward()
    gradients_agree(model, alone, within=EXACT)
    norm = nn.utils.clip_grad_norm_(alone.parameters(), 0.1)
    assert apart(clip_grad_norm(model, 0.1), norm) < 1e-12
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (model, alone)]
    for optimizer in optimizers:
        optimizer.step()
    for name, parameter in alone.named_parameters():
        assert apart(whole_of(model.get_parameter(name)), parameter.detach()) < 1e-11, name


@claims.over(2)
def nothing_is_written_into_what_blocks_return(ranks: Ranks) -> None:
    """FSDP2 warns of views among it: what is written into one would lose the gradient's hook."""
    model, seen = shard(lively(**SAME), mesh(2, device="cpu")), []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        flat = torch.utils._pytree.tree_leaves(output)
        seen.extend((t, t._version) for t in flat if isinstance(t, Tensor) and t.requires_grad)

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.register_forward_hook(note)
    model(**batch().of(ranks.rank, 2).given()).loss.backward()
    assert any(tensor._is_view() for tensor, _ in seen)
    assert all(tensor._version == version for tensor, version in seen)


@claims.over(2)
def experts_under_an_adapter_are_refused_by_name(ranks: Ranks) -> None:
    adapted, kind = plugged(), "Adapted"
    if find_spec("peft") is None:
        for layer in (module for module in adapted.modules() if isinstance(module, MoE)):
            layer.experts = type(kind, (type(layer.experts),), {})(8, 16, 4, bias=True)
    else:
        import peft

        config = peft.LoraConfig(r=2, target_parameters=["experts.wi", "experts.wo"])
        adapted, kind = peft.get_peft_model(adapted, config), "ParamWrapper"
    with pytest.raises(ConfigError, match=f"experts of {kind} cannot be divided among ranks"):
        expert_parallel(adapted, mesh(2, device="cpu"))


def prepare(folder: Path) -> None:
    """Checkpoints of one process."""
    moezoo.save(moezoo.build(LARGE, seed=0, **SMALL), folder / "small")
    moezoo.save(moezoo.build(LARGE, seed=0), folder / "large")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[int, str], str]]:
    folder = tmp_path_factory.mktemp("ranks")
    prepare(folder)
    yield started(__name__, folder)


@pytest.mark.parametrize(("world", "claim"), claims.names())
def test_over_ranks(world: int, claim: str, outcomes: dict[tuple[int, str], str]) -> None:
    assert not outcomes[world, claim], outcomes[world, claim]
