"""Statistics of a tape over the ranks of a mesh are those of all tokens together."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh

import moezoo
from moezoo.recording import Tape


def model() -> torch.nn.ModuleDict:
    torch.manual_seed(0)
    first = moezoo.SparseMLP(8, 8, 4, router={"name": "top_k", "k": 2}, capacity="switch")
    return torch.nn.ModuleDict({"first": first, "second": moezoo.SparseMLP(8, 8, 3)})


def record(rank: int) -> Tape:
    """Rank 1 has more tokens, and nothing for the second layer."""
    layers = model().train()
    x = torch.randn(2, 5 + 7 * rank, 8, generator=torch.Generator().manual_seed(rank))
    with moezoo.record(layers) as tape:
        layers["first"](x)
        if rank == 0:
            layers["second"](x)
    return tape


def ranked(rank: int, meeting_point: str, results: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(meeting_point, 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    tape = record(rank)
    said: dict[str, object] = {"alone": {n: asdict(s) for n, s in tape.stats().items()}}
    for name, shape in (("line", (2,)), ("square", (2, 1)), ("other", (1, 2))):
        axes = ("dp", "ep")[: len(shape)]
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=axes)
        said[name] = {n: asdict(s) for n, s in tape.stats(mesh).items()}
    with moezoo.record(model()) as empty:
        pass
    try:
        empty.stats(mesh)
    except moezoo.errors.RoutingError as error:
        said["empty"] = str(error)
    Path(results, f"{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


@pytest.mark.dist
def test_statistics_over_ranks_are_those_of_all_tokens_together(tmp_path: Path) -> None:
    arguments = (str(tmp_path / "meet"), str(tmp_path))
    multiprocessing.spawn(ranked, arguments, nprocs=2)
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    tapes = [record(0), record(1)]
    both = Tape(tapes[0].layers)
    for tape in tapes:
        for name, calls in tape.by_layer.items():
            both.by_layer.setdefault(name, []).extend(calls)
    expected = {name: asdict(stats) for name, stats in both.stats().items()}
    assert list(expected) == ["first.moe", "second.moe"] and expected["first.moe"]["tokens"] == 34
    for said in (one, two):
        assert said["line"] == said["square"] == said["other"]
        for name, stats in expected.items():
            for entry, value in stats.items():
                assert said["line"][name][entry] == pytest.approx(value)
        assert re.match("nothing was recorded", said["empty"])
    assert list(two["alone"]) == ["first.moe"]
    assert one["alone"]["first.moe"]["tokens"] == 10
