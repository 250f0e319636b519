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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import moezoo
from moezoo.layouts import Machine, layout
from moezoo.layouts.shapes import on_rank
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
        if over == world:
            dense = init_device_mesh("cpu", (world,))
        else:
            dense = init_device_mesh(
                "cpu", (world // over, over), mesh_dim_names=("replicas", "shards")
            )
        layers = [m for m in model.modules() if isinstance(m, moezoo.MoE)]
        stacked = [
            m.experts for m in layers if isinstance(m.experts, moezoo.experts.StackedExperts)
        ]
        for experts in stacked:
            for name, weight in list(experts.named_parameters()):
                spread = distribute_tensor(weight, mesh["ep"], [Shard(0)])
                setattr(experts, name, torch.nn.Parameter(spread))
            fully_shard(experts, mesh=mesh["dp"], shard_placement_fn=lambda _: Shard(1))
        of_experts = {id(p) for experts in stacked for p in experts.parameters()}
        for stack in ("encoder", "decoder"):
            for block in getattr(getattr(model, stack, None), "blocks", ()):
                fully_shard(block, mesh=dense)
        fully_shard(model, mesh=dense)
        sizes = {True: 0, False: 0}
        for parameter in model.parameters():
            assert isinstance(parameter, DTensor)
            sizes[id(parameter) in of_experts] += parameter.to_local().numel()
    return sizes[True], sizes[False]


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
        assert (found.expert_parameters, found.dense_parameters(rank)) == (experts, others)


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
