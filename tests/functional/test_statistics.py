"""Statistics are sums that stay on the device until somebody reads them, and keep no routing."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moezoo.functional.statistics import layer_stats, read_stats, sum_of
from moezoo.records import Routing
from moezoo.sparse_mlp import SparseMLP
from moezoo.training.loop import evaluate, expert_loads, fit, start
from moezoo.training.recipes import TrainingRecipe
from tests.training.test_loop import batches
from tests.training.text import small_model

ROUTERS = ["switch", {"name": "top_k", "k": 2}, "soft", "expert_choice", "relu", "streamed_switch"]


class NoWaiting(TorchDispatchMode):
    """Refuses operators that read a value on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(func) and "nonzero" not in str(func)
        flags = (
            [a for a in args[1] or [] if a is not None] if "aten.index.Tensor" in str(func) else []
        )
        assert not any(index.dtype == torch.bool for index in flags)
        return func(*args, **(kwargs or {}))


def routings_of(spec: Any, *, masked: bool) -> list[Routing]:
    torch.manual_seed(0)
    moe = SparseMLP(8, 16, 4, router=spec, group="sequence").moe.eval()
    mask = torch.rand(3, 6) > 0.3 if masked else None
    return [moe(torch.randn(3, 6, 8), mask=mask)[1] for _ in range(3)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("spec", ROUTERS, ids=str)
def test_sums_of_calls_are_made_without_waiting_and_equal_the_whole(
    spec: Any, masked: bool
) -> None:
    routings = routings_of(spec, masked=masked)
    with NoWaiting():
        one_by_one = [sum_of([routing]) for routing in routings]
    together, twice = read_stats([sum(one_by_one, start=torch.zeros(())), sum_of(routings)])
    assert str(together) == str(twice) == str(layer_stats(routings))  # NaN equals itself
    real = [r.real if r.real is not None else torch.ones(18, dtype=torch.bool) for r in routings]
    assert together.tokens == sum(int(each.sum()) for each in real)
    if routings[0].probs is not None:
        p = torch.cat([r.probs[mask] for r, mask in zip(routings, real, strict=True)]).detach()
        assert together.entropy == pytest.approx(
            float(torch.special.entr(p).sum(1).mean()), rel=1e-5
        )
        assert together.confidence == pytest.approx(float(p.amax(1).mean()), rel=1e-5)
    else:
        assert math.isnan(together.entropy)


def test_several_layers_are_read_in_one_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = [sum_of(routings_of(spec, masked=True)) for spec in ROUTERS]
    reads, tolist = [], Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: reads.append(self.numel()) or tolist(self))
    assert len(read_stats(sums)) == len(ROUTERS)
    assert reads == [sum(each.numel() for each in sums)]
    assert read_stats([]) == []


@pytest.mark.parametrize("router", ["switch", "sigmoid_top_k"])
def test_runs_and_evaluations_forget_a_batch_before_the_next(router: str) -> None:
    model, settings = small_model(router=router), TrainingRecipe(accumulate=4)
    seen: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def noted(module: Any, inputs: Any, output: Any) -> None:
        gc.collect()
        alive.append(sum(ref() is not None for ref in seen))
        seen.extend(weakref.ref(routing) for routing in output.routing)

    handle = model.register_forward_hook(noted)
    evaluate(model, batches(), count=4)
    expert_loads(model, batches(), count=4)
    one_batch = len(model.config.encoder_sparse) + len(model.config.decoder_sparse)
    assert max(alive) <= one_batch
    alive.clear()
    fit(start(model, settings, steps=1), batches(), settings, steps=1)
    adapts = router == "sigmoid_top_k"  # to all batches of a step at once
    assert max(alive) == (3 * one_batch if adapts else one_batch)
    handle.remove()


def test_an_evaluation_judges_a_layer_by_all_its_batches() -> None:
    model = small_model(capacity="dropless")
    found, layers = evaluate(model, batches(), count=5), expert_loads(model, batches(), count=5)
    assert found["max_violation"] == max(layer.max_violation for layer in layers)
    assert found["dead"] == sum(len(layer.dead) for layer in layers)
