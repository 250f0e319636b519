"""Differentiated, batched or traced: right or refused by name, as docs/transforms.md has it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

import moezoo

PAGE = Path(__file__).parent.parent / "docs" / "transforms.md"
# Torch's own, of how it differentiates forward, batches by a loop, and traces.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.searchsorted:UserWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


class Subject:
    """A function x -> y of a module, in float64, and its Jacobian by `backward`, row by row."""

    def __init__(self, module: nn.Module, x: Tensor, function: Callable[..., Tensor]) -> None:
        self.module, self.x, self.function = module, x, function
        self.v = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
        self.xs = torch.stack([x, x + self.v, x - 2 * self.v])

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(self.module, x)

    def loss(self, x: Tensor) -> Tensor:
        return self(x).square().sum()

    def jacobian(self) -> Tensor:
        x = self.x.clone().requires_grad_()
        y = self(x)
        rows = [torch.autograd.grad(one, x, retain_graph=True)[0] for one in y.reshape(-1)]
        return torch.stack(rows).view(*y.shape, *x.shape)

    def gradient(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(self.loss(x), x)[0]

    def along(self) -> Tensor:
        return (self.jacobian() * self.v).flatten(-self.x.dim()).sum(-1)

    def second(self) -> Tensor:
        x = self.x.clone().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):
            first = torch.autograd.grad(self.loss(x), x, create_graph=True)[0]
        rows = [torch.autograd.grad(one, x, retain_graph=True)[0] for one in first.reshape(-1)]
        return torch.stack(rows).view(*x.shape, *x.shape)


def twice(s: Subject) -> None:
    step = 1e-5 * s.v
    expected = (s.gradient(s.x + step) - s.gradient(s.x - step)) / 2e-5
    found = (s.second() * s.v).flatten(-s.x.dim()).sum(-1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def batched(s: Subject) -> None:
    x = s.x.clone().requires_grad_()
    y = s(x)
    rows = torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)
    found = torch.autograd.grad(y, x, rows, is_grads_batched=True)[0]
    torch.testing.assert_close(found.view(*y.shape, *x.shape), s.jacobian())


def forward_mode(s: Subject) -> None:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(s(forward_ad.make_dual(s.x, s.v))).tangent
        torch.testing.assert_close(tangent, s.along())


def forward_mode_without_grad(s: Subject) -> None:
    expected = s.along()
    with torch.no_grad(), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(s(forward_ad.make_dual(s.x, s.v))).tangent
        torch.testing.assert_close(tangent, expected)


def backward_function(s: Subject) -> None:
    y, pull = vjp(s, s.x)
    torch.testing.assert_close(pull(2 * y)[0], s.gradient(s.x))


def forward_function(s: Subject) -> None:
    y, tangent = jvp(s, (s.x,), (s.v,))
    torch.testing.assert_close(y, s(s.x))
    torch.testing.assert_close(tangent, s.along())


def by_rows(s: Subject) -> None:
    torch.testing.assert_close(jacrev(s)(s.x), s.jacobian())


def by_columns(s: Subject) -> None:
    torch.testing.assert_close(jacfwd(s)(s.x), s.jacobian())


def second_derivative(s: Subject) -> None:
    expected = s.second()
    for found in (hessian(s.loss), jacfwd(jacfwd(s.loss)), jacrev(jacrev(s.loss))):
        torch.testing.assert_close(found(s.x), expected)


def mapped(s: Subject) -> None:
    torch.testing.assert_close(torch.vmap(s)(s.xs), torch.stack([s(x) for x in s.xs]))


def mapped_gradient(s: Subject) -> None:
    expected = torch.stack([s.gradient(x) for x in s.xs])
    torch.testing.assert_close(torch.vmap(grad(s.loss))(s.xs), expected)


def mapped_models(s: Subject) -> None:
    models = [copy.deepcopy(s.module) for _ in range(3)]
    for parameter in models[1].parameters():
        parameter.data.mul_(1.5)
    for parameter in models[2].parameters():
        parameter.data.neg_()

    def call(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        state = {f"module.{k}": v for k, v in (*parameters.items(), *buffers.items())}
        return functional_call(Called(s), state, (s.x,))

    found = torch.vmap(call)(*stack_module_state(models))
    expected = torch.stack([s.function(model, s.x) for model in models])
    torch.testing.assert_close(found, expected)


def traced(s: Subject) -> None:
    with pytest.warns((DeprecationWarning, FutureWarning), match="torch.jit.trace"):
        program = torch.jit.trace(Called(s), s.x, check_trace=False)
    for x in (s.xs[1], torch.cat([s.x, s.xs[1]], dim=-2)):
        torch.testing.assert_close(program(x), s(x))


def exported(s: Subject) -> None:
    program = torch.export.export(Called(s), (s.x,)).module()
    torch.testing.assert_close(program(s.xs[1]), s(s.xs[1]))


def cached(s: Subject) -> None:
    """The gradient of a model that reads three rows at a time is that of one that reads all."""

    def loss(x: Tensor) -> Tensor:
        first = s.module(inputs_embeds=x[None], decoder_inputs_embeds=x[None, :2], use_cache=True)
        memory, cache, logits = first.encoder_last_hidden_state, first.past_key_values, first.logits
        for place in range(2, len(x)):
            one = x[None, place : place + 1]
            step = s.module(
                encoder_last_hidden_state=memory, decoder_inputs_embeds=one, past_key_values=cache
            )
            logits = torch.cat([logits, step.logits], 1)
        return logits.square().sum()

    def at_once(x: Tensor) -> Tensor:
        return s.module(inputs_embeds=x[None], decoder_inputs_embeds=x[None]).logits.square().sum()

    for way in (s.gradient, lambda x: grad(s.loss)(x)):
        s.loss = at_once  # type: ignore[method-assign]
        expected = way(s.x)
        s.loss = loss  # type: ignore[method-assign]
        torch.testing.assert_close(way(s.x), expected)


class Called(nn.Module):
    """A subject as a module with one input."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.module, self.function = subject.module, subject.function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.module, x)


ROWS: dict[str, Callable[[Subject], None]] = {
    "gradients of gradients": twice,
    "gradients through cached steps": cached,
    "`is_grads_batched`": batched,
    "`forward_ad`": forward_mode,
    "`forward_ad` under `no_grad`": forward_mode_without_grad,
    "`torch.func.vjp`": backward_function,
    "`torch.func.jvp`": forward_function,
    "`torch.func.jacrev`": by_rows,
    "`torch.func.jacfwd`": by_columns,
    "`torch.func.hessian`": second_derivative,
    "`torch.func.vmap`": mapped,
    "`vmap` of `grad`": mapped_gradient,
    "`vmap` of models": mapped_models,
    "`torch.jit.trace`": traced,
    "`torch.export`": exported,
}


def table() -> dict[str, list[str]]:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]
    return {first: rest for first, *rest in cells}


def layer(router: str, experts: str, capacity: str | None = None) -> Subject:
    torch.manual_seed(0)
    made = moezoo.SparseMLP(
        6, 8, 3, router=router, experts=experts, capacity=capacity, activation="gelu", vocab_size=24
    )
    ids = torch.arange(24) if made.moe.router.needs_token_ids else None

    def call(module: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = module(x, token_ids=None if ids is None else ids[: x.shape[0]])
        return y

    return Subject(made.double().eval(), torch.randn(4, 6, dtype=torch.float64), call)


def model(num_experts: int) -> Subject:
    config = moezoo.SwitchConfig(
        vocab_size=7, d_model=4, d_kv=2, d_ff=6, num_heads=2, num_layers=2, num_experts=num_experts
    )

    def call(module: nn.Module, x: Tensor) -> Tensor:
        logits: Tensor = module(inputs_embeds=x[None], decoder_inputs_embeds=x[None]).logits
        return logits

    torch.manual_seed(0)
    built = moezoo.build(config, seed=0).double().eval()
    return Subject(built, torch.randn(3, 4, dtype=torch.float64), call)


def agrees(row: str, claim: str, subject: Subject, waits: bool = False) -> None:
    if claim == "refused" or (claim == "right but where the host waits" and waits):
        reason = "torch.jit.trace keeps" if claim == "refused" else "waits for a number"
        with pytest.raises(moezoo.MoezooError, match=reason):
            ROWS[row](subject)
    else:
        assert claim.startswith("right")
        ROWS[row](subject)


def test_the_table_has_the_rows_that_are_tried() -> None:
    assert list(table()) == list(ROWS)


LAYER_ROWS = [row for row in ROWS if row != "gradients through cached steps"]
PARTS = [
    *((router, "stacked", None) for router in moezoo.routers.names()),
    *(("switch", container, "first_come") for container in moezoo.experts.names()),
    *(("switch", "stacked", policy) for policy in moezoo.capacity.names()),
]
# Not one graph, as tests/test_graphs.py has it.
NO_GRAPH = ("relu", "expert_threshold", "modules")


@pytest.mark.parametrize("row", LAYER_ROWS)
@pytest.mark.parametrize(("router", "experts", "capacity"), PARTS)
def test_a_layer_is_right_or_refused_under_a_transformation(
    row: str, router: str, experts: str, capacity: str | None
) -> None:
    if ROWS[row] is exported and {router, experts} & set(NO_GRAPH):
        return
    subject = layer(router, experts, capacity)
    moe = subject.module.moe
    agrees(row, table()[row][0], subject, moe.router.waits or moe.experts.waits)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("num_experts", [0, 2], ids=["dense", "switch"])
def test_a_model_is_right_or_refused_under_a_transformation(row: str, num_experts: int) -> None:
    agrees(row, table()[row][1 + (num_experts > 0)], model(num_experts))


def test_training_with_dropout_takes_batched_and_second_gradients() -> None:
    config = moezoo.SwitchConfig(
        vocab_size=7, d_model=4, d_kv=2, d_ff=6, num_heads=2, num_layers=2, num_experts=2
    )
    built = moezoo.build(config, seed=0).double()
    ids = torch.tensor([[2, 3, 4]])
    logits = built(ids, labels=ids).logits
    parameters = list(built.parameters())
    rows = torch.randn(2, *logits.shape, dtype=torch.float64)

    def gradients(grads: Tensor, **options: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            logits, parameters, grads, retain_graph=True, materialize_grads=True, **options
        )

    many = gradients(rows, is_grads_batched=True)
    for number, row in enumerate(rows):
        for found, again, expected in zip(
            many, gradients(row, create_graph=True), gradients(row), strict=True
        ):
            torch.testing.assert_close(found[number], expected)
            torch.testing.assert_close(again, expected)
