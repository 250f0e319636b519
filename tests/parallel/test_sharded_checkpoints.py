"""Building, loading and saving over ranks: the bytes of one process, and no more held."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Replicate, Shard

import moezoo
from moezoo.adapters import checkpoint, tensor_files
from moezoo.adapters.transformers import to_transformers
from moezoo.errors import ConfigError, NonFiniteWeights, SaveError, TargetExists
from moezoo.functional.shards import local_of, part_of
from moezoo.parallel import expert_parallel, mesh, shard
from tests.models.tiny import TINY
from tests.parallel.ranks import Claims, Ranks, batch, lively, meshes, started, whole_of

claims = Claims()
pytestmark = pytest.mark.dist

MODELS: dict[str, dict[str, Any]] = {
    "tied": {},
    "gated and untied": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "MoE++": {"num_experts": 8, "experts": {"name": "zero", "zero": 2, "copy": 1, "constant": 1}},
    "relu routing": {"router": "relu", "router_losses": {}},
}


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: whole_of(tensor) for name, tensor in model.state_dict().items()}


@claims.over(1, 2, 4)
def a_seed_gives_the_same_weights_over_any_ranks(ranks: Ranks) -> None:
    for name, overrides in MODELS.items():
        grids = meshes(ranks)
        models = [moezoo.build(TINY, mesh=grid, seed=5, **overrides) for grid in grids]
        first = ranks.folder / f"drawn {name}"
        if ranks.world == 1:
            moezoo.save(models[0], first)
            stack = next(t for n, t in weights(models[0]).items() if "experts" in n)
            assert len({float(expert.sum()) for expert in stack}) == stack.shape[0]
        for number, model in enumerate(models):
            target = ranks.folder / f"{name} {ranks.world} {number}"
            moezoo.save(model, target)
            assert contents(target) == contents(first)
    others = moezoo.build(TINY, mesh=grids[0]), moezoo.build(TINY, mesh=grids[0], seed=6)
    assert not torch.equal(*(whole_of(model.shared.weight) for model in others))


@claims.over(2, 4)
def a_sharded_model_is_saved_as_the_bytes_of_the_whole_one(ranks: Ranks) -> None:
    for name, overrides in MODELS.items():
        whole, options = lively(**overrides), {"max_shard_size": "9KB"}
        target = ranks.folder / f"whole {ranks.world} {name}"
        if ranks.rank == 0:
            moezoo.save(whole, target, **options)
        dist.barrier()
        for number, grid in enumerate([*meshes(ranks), mesh(1, device="cpu")]):
            kinds = (shard, expert_parallel) if grid["ep"].size() > 1 else (shard,)
            for divide in kinds:
                place = ranks.folder / f"{divide.__name__} {ranks.world} {number} {name}"
                moezoo.save(divide(lively(**overrides), grid), place, **options)
                assert len(contents(place)) > 4
                assert contents(place) == contents(target), (divide, grid)


@claims.over(4)
def dense_weights_are_drawn_and_read_by_node(ranks: Ranks) -> None:
    grid, target = mesh(2, device="cpu"), ranks.folder / "by node"
    drawn = moezoo.build(TINY, mesh=grid, seed=5, hybrid=True)
    moezoo.save(drawn, target)
    assert contents(target) == contents(ranks.folder / "drawn tied")
    read, whole = moezoo.load(target, mesh=grid, hybrid=True), moezoo.load(target)
    for name, tensor in read.named_parameters():
        if ".experts." not in name:
            assert local_of(drawn.get_parameter(name)).shape == local_of(tensor).shape, name
            assert tensor.placements == (Replicate(), Shard(0)), name
        assert torch.equal(whole_of(tensor), whole.get_parameter(name)), name
    with pytest.raises(ConfigError, match="hybrid needs a mesh"):
        moezoo.load(target, hybrid=True)


@claims.over(2, 4)
def a_rank_reads_and_holds_its_share_of_a_checkpoint(ranks: Ranks) -> None:
    read: list[int] = []
    judged = checkpoint._is_finite

    def counted(tensor: torch.Tensor) -> bool:
        read.append(tensor.nbytes)
        return judged(tensor)

    checkpoint._is_finite = counted
    try:
        for name, overrides in MODELS.items():
            source, target = lively(torch.float32, **overrides), ranks.folder / f"read {name}"
            if ranks.rank == 0 and not target.exists():
                moezoo.save(source, target)
            dist.barrier()
            whole = moezoo.load(target)
            for grid in [*meshes(ranks), mesh(1, device="cpu")]:
                read.clear()
                model = moezoo.load(target, mesh=grid)
                for key, tensor in model.state_dict().items():
                    theirs = part_of(tensor).taken(whole.state_dict()[key])
                    assert torch.equal(local_of(tensor), theirs), key
                mine = sum(local_of(p).nbytes for p in model.parameters())
                assert sum(read) == mine + sum(b.nbytes for b in model.buffers())
                everything = torch.tensor(mine)
                dist.all_reduce(everything)
                assert int(everything) == sum(p.nbytes for p in whole.parameters())
    finally:
        checkpoint._is_finite = judged


@claims.over(2)
def an_upcycled_directory_is_read_in_its_own_precision_and_trains(ranks: Ranks) -> None:
    dense, target = ranks.folder / "dense", ranks.folder / "upcycled"
    if ranks.rank == 0:
        moezoo.save(lively(torch.bfloat16, num_experts=0), dense)
        moezoo.upcycle(dense, target, num_experts=4)
    dist.barrier()
    whole, given = moezoo.load(target), batch().of(ranks.rank, 2)
    model = moezoo.load(target, mesh=mesh(2, device="cpu"))
    with torch.no_grad():
        assert torch.equal(*(m(**given.given()).logits for m in (model, whole)))
    assert {p.dtype for p in model.parameters()} == {p.dtype for p in whole.parameters()}
    for key, tensor in weights(model).items():
        assert torch.equal(tensor, whole.state_dict()[key])
    wide = moezoo.load(
        target, mesh=mesh(1, device="cpu"), dtype=torch.float32, precision=torch.bfloat16
    ).train()
    wide(**given.given()).loss.backward()
    grads = [p.grad for p in wide.parameters() if p.requires_grad]
    assert all(g is not None and g.dtype == torch.float32 for g in grads)


@claims.over(2)
def what_fails_on_one_rank_fails_on_all_and_leaves_nothing(ranks: Ranks) -> None:
    model, folder = shard(lively(), mesh(2, device="cpu")), ranks.folder / "fails"
    target = folder / "out"
    moezoo.save(model, target)
    before = contents(target)
    with pytest.raises(TargetExists, match="exists already"):
        moezoo.save(model, target)
    put, write = tensor_files.TensorFile.put, tensor_files.TensorFiles.write

    def full(self: Any, *args: Any) -> None:
        raise OSError(28, "No space left on device")

    try:
        if ranks.rank == 1:
            tensor_files.TensorFile.put = full
        with pytest.raises(SaveError, match="the disk is full"):
            moezoo.save(model, target, overwrite=True)
        tensor_files.TensorFile.put = put
        if ranks.rank == 1:
            tensor_files.TensorFiles.write = lambda *_, **__: 0
        with pytest.raises(SaveError, match="did not write every byte once"):
            moezoo.save(model, target, overwrite=True)
    finally:
        tensor_files.TensorFile.put, tensor_files.TensorFiles.write = put, write
    dist.barrier()
    assert contents(target) == before
    assert [path.name for path in folder.iterdir()] == ["out"]
    bad = lively(torch.float32)
    with torch.no_grad():
        bad.shared.weight[-1, 0] = float("nan")
    if ranks.rank == 0:
        moezoo.save(bad, folder / "bad")
    dist.barrier()
    if ranks.rank == 1:  # who holds the last row says so
        with pytest.raises(NonFiniteWeights, match="shared.weight"):
            moezoo.load(folder / "bad", mesh=mesh(2, device="cpu"))
    else:
        moezoo.load(folder / "bad", mesh=mesh(2, device="cpu"))


@claims.over(2)
def what_needs_the_whole_model_is_refused_by_name(ranks: Ranks) -> None:
    model = shard(lively(torch.float32, num_experts=4).eval(), mesh(2, device="cpu"))
    for act, word in [
        (lambda: moezoo.quantize(model), "quantising"),
        (lambda: moezoo.upcycle(model, num_experts=2), "upcycling"),
        (lambda: moezoo.downcycle(model), "downcycling"),
        (lambda: moezoo.resize_embeddings(model, 70), "resizing"),
        (lambda: to_transformers(model), "to_transformers"),
        (lambda: moezoo.plug(model, "encoder.blocks.0.mlp", lambda m: m), "plugging"),
    ]:
        with pytest.raises(ConfigError, match=f"{word} needs a model that is not sharded"):
            act()
    with pytest.raises(ConfigError, match="a precision needs a mesh"):
        moezoo.build(TINY, precision=torch.bfloat16)


@claims.over(2)
def ddp_is_looked_through(ranks: Ranks) -> None:
    wrapped = nn.parallel.DistributedDataParallel(lively(torch.float32))
    if ranks.rank == 0:  # of a model that every rank holds one saves, as ever
        moezoo.save(wrapped, ranks.folder / "ddp")
        moezoo.save(lively(torch.float32), ranks.folder / "plain")
        assert contents(ranks.folder / "ddp") == contents(ranks.folder / "plain")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[int, str], str]]:
    yield started(__name__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(("world", "claim"), claims.names(), ids=lambda x: str(x))
def test_over_ranks(world: int, claim: str, outcomes: dict[tuple[int, str], str]) -> None:
    assert not outcomes[world, claim], outcomes[world, claim]
