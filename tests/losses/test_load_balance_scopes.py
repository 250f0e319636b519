"""What f and P are taken over: sequence, group, batch, all ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor

import moezoo
from moezoo import losses
from moezoo.errors import ConfigError, RoutingError
from moezoo.records import Routing
from tests.capacity.routings import of_probs, routing


def by_loop(record: Routing, size: int) -> float:
    """E * sum f P per part of `size` tokens, averaged over the parts that hold real tokens."""
    values = []
    best = record.probs.argmax(-1).tolist()
    for start in range(0, len(best), size):
        end = min(start + size, len(best))
        real = [t for t in range(start, end) if record.real is None or record.real[t]]
        if real:
            f = [sum(best[t] == e for t in real) / len(real) for e in range(3)]
            p = record.probs[real].mean(0).tolist()
            values.append(3 * sum(a * b for a, b in zip(f, p, strict=True)))
    return sum(values) / len(values)


@pytest.mark.parametrize("padded", [False, True])
def test_scopes_equal_loops(padded: bool) -> None:
    record = routing(24, 3, group_size=8, padded=padded)
    whole = Routing(record.assignment, probs=record.probs, real=record.real, sequence_length=6)
    for scope, size in (("batch", 24), ("global", 24), ("group", 8), ("sequence", 6)):
        value = losses.build({"name": "load_balance", "scope": scope})(whole).item()
        assert value == pytest.approx(by_loop(whole, size), rel=1e-5), scope


def test_the_layer_tells_the_sequence_length_whatever_the_group() -> None:
    torch.manual_seed(0)
    layer = moezoo.SparseMLP(4, 8, 3, group=7).moe
    loss = losses.build({"name": "load_balance", "scope": "sequence"})
    _, routing_of_all = layer(x := torch.randn(2, 5, 4))
    alone = [loss(layer(row[None])[1]) for row in x]
    assert torch.allclose(loss(routing_of_all), torch.stack(alone).mean(), atol=1e-6)


def test_collapse_within_each_sequence_shows_in_the_sequence_scope_only() -> None:
    probs = torch.eye(2)[[0] * 5 + [1] * 5]
    record = of_probs(probs)
    whole = Routing(record.assignment, probs=probs, sequence_length=5)
    values = {
        scope: losses.build({"name": "load_balance", "scope": scope})(whole).item()
        for scope in ("batch", "sequence")
    }
    assert values == {"batch": 1.0, "sequence": 2.0}


def test_an_unknown_sequence_length_is_refused() -> None:
    with pytest.raises(RoutingError, match="needs to know the sequence length"):
        losses.build({"name": "load_balance", "scope": "sequence"})(routing())


def test_an_unknown_scope_is_refused() -> None:
    with pytest.raises(ConfigError, match="'sequence' or 'group' or 'batch' or 'global'"):
        losses.build({"name": "load_balance", "scope": "world"})
    with pytest.raises(ConfigError, match="'batch' or 'global', found 'sequence'"):
        losses.build({"name": "z", "scope": "sequence"})


def _probs(rank: int) -> Tensor:
    source = torch.Generator().manual_seed(rank)
    return torch.randn(3 + 4 * rank, 3, generator=source).softmax(-1)


def _global_loss(rank: int, meeting_point: str, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=2)
    probs = _probs(rank).requires_grad_()
    value = losses.build({"name": "load_balance", "scope": "global"})(of_probs(probs))
    value.backward()
    torch.save((value.detach(), probs.grad), f"{results}/{rank}.pt")
    dist.destroy_process_group()


def test_global_scope_over_two_ranks_is_the_loss_of_all_tokens_together(tmp_path: Path) -> None:
    multiprocessing.spawn(_global_loss, (f"file://{tmp_path}/meet", str(tmp_path)), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    together = torch.cat([_probs(0), _probs(1)]).requires_grad_()
    whole = losses.build("load_balance")(of_probs(together))
    whole.backward()
    assert torch.allclose((parts[0][0] + parts[1][0]) / 2, whole.detach())
    gradient = torch.cat([parts[0][1], parts[1][1]]) / 2  # DDP's mean over ranks
    assert torch.allclose(gradient, together.grad, atol=1e-6)
