"""Another default device than the model's: every tensor that is made inside names its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moezoo
from moezoo.adapters.upcycle.calibration import Calibration
from moezoo.adapters.upcycle.export import export
from moezoo.adapters.upcycle.grow import grow
from moezoo.adapters.upcycle.shrink import shrink
from moezoo.adapters.verify import verify
from moezoo.pairing import loss_refusal
from moezoo.product_table import policy_products
from moezoo.routers import Router
from moezoo.training.loop import evaluate, fit, start
from moezoo.training.recipes import TrainingRecipe
from tests.models.tiny import source, tiny
from tests.training.test_loop import batches
from tests.training.text import small_model

D_MODEL, EXPERTS, VOCABULARY = 6, 4, 24
COUNTED = {"base", "expert_threshold", "relu"}  # how many pairs there are depends on values
PRODUCTS = [(p.router, p.partner) for p in policy_products() if not p.refused]


@contextmanager
def foreign() -> Iterator[None]:
    """ "meta" holds nothing, so that whoever forgets a device is caught on any machine."""
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


def same_under_it(run: Callable[[], list[Tensor]]) -> None:
    """Assert that a computation gives the same numbers, seeded, whatever the default device."""
    torch.manual_seed(1)
    expected = run()
    torch.manual_seed(1)
    with foreign():
        found = run()
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.device == theirs.device
        assert torch.equal(ours, theirs)


def trained(layer: nn.Module, x: Tensor, mask: Tensor | None, ids: Tensor) -> list[Tensor]:
    """What a layer gives in training and evaluation, of many tokens and one, its gradients and
    losses, and the weights after a step.
    """
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1) if list(layer.parameters()) else None
    layer.train()
    x = x.clone().requires_grad_()
    with moezoo.record(layer) as tape:
        y = layer(x, mask=mask, token_ids=ids)
        weights = _weights(layer.moe.router)  # type: ignore[arg-type, union-attr]
        loss = y.square().sum() + (tape.loss(weights) if weights else 0.0)
    loss.backward()
    tape.stats()
    tape.adapt()
    if optimizer is not None:
        optimizer.step()
    layer.eval()
    with torch.no_grad():
        many = layer(x, mask=mask, token_ids=ids)
        one = layer(x[:1, :1], token_ids=ids[:1, :1])
    assert x.grad is not None
    return [y.detach(), x.grad, many, one, *(t.clone() for t in layer.state_dict().values())]


def _weights(router: Router) -> dict[str, float]:
    """Of every loss that the router can feed."""
    made = {name: moezoo.losses.build(name) for name in moezoo.losses.names()}
    return {n: 0.1 for n, loss in made.items() if loss_refusal(router, loss, n) is None}


def check_layer(**options: Any) -> None:
    x = torch.randn(2, 5, D_MODEL)
    ids = torch.randint(VOCABULARY, (2, 5))
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    for padding in (None, mask):

        def run(padding: Tensor | None = padding) -> list[Tensor]:
            with torch.device("cpu"):
                torch.manual_seed(0)
                layer = moezoo.SparseMLP(D_MODEL, 8, EXPERTS, vocab_size=VOCABULARY, **options)
            return trained(layer, x, padding, ids)

        same_under_it(run)


@pytest.mark.parametrize(("router", "policy"), PRODUCTS, ids=str)
def test_every_router_and_policy_trains_on_the_cpu(router: str, policy: str) -> None:
    check_layer(router=router, capacity=policy)


@pytest.mark.parametrize(
    ("router", "policy"),
    [(router, policy) for router, policy in PRODUCTS if router not in COUNTED],
    ids=str,
)
def test_a_layer_of_shapes_alone_gives_shapes(router: str, policy: str) -> None:
    layer = moezoo.SparseMLP(
        D_MODEL, 8, EXPERTS, vocab_size=VOCABULARY, router=router, capacity=policy
    ).to("meta")
    for rows in (slice(0, 2), slice(0, 1)):
        x = torch.empty(2, 5, D_MODEL, device="meta")[rows, rows].requires_grad_()
        ids = torch.empty(2, 5, dtype=torch.int64, device="meta")[rows, rows]
        for training in (True, False):
            y = layer.train(training)(x, token_ids=ids)
            assert y.shape == x.shape and y.is_meta
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert grad.shape == x.shape


@pytest.mark.parametrize("group", ["batch", "sequence", 4])
@pytest.mark.parametrize("experts", moezoo.experts.names())
def test_every_container_trains_on_the_cpu(experts: str, group: str | int) -> None:
    for activation in ("relu", "gated-gelu"):
        check_layer(
            experts=experts, activation=activation, group=group, dropout=0.3, shared={"gated": True}
        )


def test_many_experts_train_on_the_cpu() -> None:
    x, ids = torch.randn(2, 5, D_MODEL), torch.zeros(2, 5, dtype=torch.int64)

    def run() -> list[Tensor]:
        with torch.device("cpu"):
            torch.manual_seed(0)
            layer = moezoo.SparseMLP(D_MODEL, 4, 512)
        return trained(layer, x, None, ids)

    same_under_it(run)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "top_k": 5}])
@pytest.mark.parametrize("rows", [1, 3])
def test_models_compute_and_generate_on_the_cpu(options: dict[str, Any], rows: int) -> None:
    model: Any = tiny()
    ids = source(rows)
    mask = torch.ones_like(ids)
    mask[-1, 5:] = 0

    def run() -> list[Tensor]:
        out = model(ids, mask, labels=ids)
        out.loss.backward()
        made = model.generate(ids, attention_mask=mask, max_new_tokens=4, **options)
        return [out.logits.detach(), model.shared.weight.grad.clone(), made]

    model.zero_grad()
    run()
    model.zero_grad()
    torch.manual_seed(1)
    expected = run()
    model.zero_grad()
    torch.manual_seed(1)
    with foreign():
        found = run()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_training_loop_runs_on_the_cpu() -> None:
    def run() -> list[Tensor]:
        with torch.device("cpu"):
            model, data = small_model(dropout_rate=0.1), batches(4)
        settings = TrainingRecipe()
        records = fit(start(model, settings, steps=2), data, settings, steps=2)
        values = evaluate(model, data, count=1)
        with torch.device("cpu"):
            return [torch.tensor([*(r.gradient_norm for r in records), *values.values()])]

    same_under_it(run)


@pytest.mark.parametrize(
    "init", ["copy", "noise:0.1", "drop:0.5", "split", "virtual_group:2", "lora:2"]
)
def test_conversions_are_made_and_verified_on_the_cpu(init: str, tmp_path: Path) -> None:
    with torch.device("cpu"):
        dense = tiny(num_experts=0, router="switch", capacity=None, experts="stacked")
    moezoo.save(dense, tmp_path / "dense")
    names = iter(range(100))

    def run() -> list[Tensor]:
        path = tmp_path / str(next(names))
        moezoo.upcycle(tmp_path / "dense", path / "up", num_experts=4, init=init, dtype="float16")
        assert verify(path / "up", tmp_path / "dense").passed
        made = [moezoo.upcycle(dense, num_experts=4, init=init), moezoo.load(path / "up")]
        if init == "copy":
            made.append(moezoo.downcycle(made[0]))
            grow(path / "up", path / "grown")
            shrink(path / "grown", path / "less", num_experts=3)
            export(path / "less", path / "out", vocab_size=99)
            made += [moezoo.load(path / "grown"), moezoo.load(path / "out")]
        return [tensor.clone() for model in made for tensor in model.state_dict().values()]

    same_under_it(run)


@pytest.mark.parametrize("router_init", ["mean_orthogonal", "centroids", "prompts"])
def test_routers_are_fitted_to_text_on_the_cpu(router_init: str, tmp_path: Path) -> None:
    with torch.device("cpu"):
        dense = tiny(num_experts=0, router="switch", capacity=None, experts="stacked")
    moezoo.save(dense, tmp_path / "dense")
    sample = Calibration([[5, 9, 1], [7, 1], [8, 11, 1]], experts=[0, 0, 1])
    names = iter(range(100))

    def run() -> list[Tensor]:
        path = tmp_path / str(next(names))
        moezoo.upcycle(
            tmp_path / "dense", path, num_experts=2, router_init=router_init, calibration=sample
        )
        return [tensor.clone() for tensor in moezoo.load(path).state_dict().values()]

    same_under_it(run)
