"""Parameters by rank are those of FSDP2 and expert parallelism, to the number: counted on a fake
process group, on weights without memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import moezoo
from moezoo.layouts import Machine, layout
from moezoo.layouts.shapes import on_rank
from moezoo.models.block import Block
from moezoo.parallel import expert_parallel, shard
from moezoo.presets import preset

TINY: dict[str, Any] = {
    "vocab_size": 61, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 3, "num_layers": 3,
    "num_experts": 8,
}  # fmt: skip


@contextmanager
def ranks(world: int, rank: int) -> Iterator[None]:
    """One rank of a group of so many whose others do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def held(
    config: moezoo.SwitchConfig, world: int, rank: int, ep: int, over: int, task: str
) -> tuple[int, int]:
    """Numbers of experts and of all else that torch leaves to a rank."""
    with ranks(world, rank):
        model = moezoo.build(config, task=task, device="meta")
        mesh = init_device_mesh("cpu", (world // ep, ep), mesh_dim_names=("dp", "ep"))
        stacks = [m for m in model.modules() if isinstance(m, moezoo.experts.StackedExperts)]
        if over == world and (stacks or not config.num_experts):
            shard(model, mesh)
        else:
            _replicated(model, mesh, stacks, over)
        of_experts = {id(p) for experts in stacks for p in experts.parameters()}
        sizes = {True: 0, False: 0}
        for parameter in model.parameters():
            own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            sizes[id(parameter) in of_experts] += own.numel()
    return sizes[True], sizes[False]


def _replicated(
    model: torch.nn.Module, mesh: DeviceMesh, stacks: list[torch.nn.Module], over: int
) -> None:
    """Experts over the mesh, all else over `over` neighbours and the same on all of these."""
    sizes = (mesh.size() // over, over)
    dense = init_device_mesh("cpu", sizes, mesh_dim_names=("replicas", "shards"))
    if mesh["ep"].size() > 1:
        expert_parallel(model, mesh)
        for experts in stacks:
            fully_shard(experts, mesh=mesh["dp"], shard_placement_fn=lambda _: Shard(1))
    for block in [m for m in model.modules() if isinstance(m, Block)]:
        fully_shard(block, mesh=dense)
    fully_shard(model, mesh=dense)


CASES = [
    ({}, 1, 1, 1, "conditional_generation"),
    ({}, 2, 2, 2, "conditional_generation"),
    ({"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, 4, 2, 4, "model"),
    ({"position_bias_every_layer": True, "own_embeddings": ("decoder",)}, 8, 8, 8, "model"),
    ({"router": "top_k", "router_bias": True, "num_decoder_layers": 2}, 8, 4, 4,
     "conditional_generation"),
    ({"encoder_sparse_layers": "all", "shared_expert": {"d_ff": 10}}, 8, 1, 8, "encoder"),
    ({"d_model": 12, "router": "noisy_top_k", "tie_word_embeddings": False}, 6, 2, 6,
     "conditional_generation"),
    ({"num_experts": 3}, 4, 1, 2, "encoder"),
    ({"experts": {"name": "zero", "zero": 1, "copy": 0, "constant": 1}}, 6, 3, 6, "model"),
    ({"num_experts": 0}, 4, 1, 4, "conditional_generation"),
    ({"experts": "modules"}, 4, 1, 4, "conditional_generation"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "world", "ep", "over", "task"), CASES, ids=str)
def test_every_rank_of_a_small_model_holds_what_is_reckoned(
    changes: dict[str, Any], world: int, ep: int, over: int, task: str
) -> None:
    config = moezoo.SwitchConfig(**{**TINY, **changes})
    node = Machine(node=over if over < world else 8)
    found = layout(config, gpus=world, ep=ep, dense_over=over, task=task, machine=node)
    for rank in range(world):
        experts, others = held(config, world, rank, ep, over, task)
        assert found.dense_parameters(rank) == others
        if ep > 1 or rank == 0:  # with ep 1, experts too are cut by rounding
            assert found.expert_parameters == experts


@pytest.mark.parametrize(
    ("name", "world", "ep", "over", "some"),
    [
        ("switch-base-128", 8, 4, 8, (0, 7)),
        ("switch-xxl-128", 64, 32, 8, (5,)),
        ("switch-c-2048", 512, 512, 512, (0, 511)),
    ],
)
def test_published_models_lie_as_is_reckoned(
    name: str, world: int, ep: int, over: int, some: tuple[int, ...]
) -> None:
    found = layout(name, gpus=world, ep=ep, dense_over=over)
    for rank in some:
        experts, others = held(preset(name), world, rank, ep, over, "conditional_generation")
        assert (found.expert_parameters, found.dense_parameters(rank)) == (experts, others)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 8, 64])
def test_the_shares_of_all_ranks_are_the_whole(ranks: int) -> None:
    shapes = [(61, 16), (16,), (3, 5), (8, 2, 3), (1,), ()]
    whole = sum(torch.Size(shape).numel() for shape in shapes)
    assert sum(on_rank(shapes, ranks, rank) for rank in range(ranks)) == whole
    assert on_rank(shapes, ranks, 0) == max(on_rank(shapes, ranks, r) for r in range(ranks))
