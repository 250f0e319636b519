"""What a module is taken for is tried: dense and plugged must agree on tokens that nobody chose."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from moezoo.errors import ConfigError

_TOLERANCE = 1e-4
_FAILURES = (TypeError, ValueError, RuntimeError, IndexError, AttributeError, AssertionError)
_HINT = "Choose its MLP, or pass a `make` of your own that returns a moezoo.SparseMLP."


def check_row_wise(mlp: nn.Module, d_model: int) -> None:
    """Refuse a module that is no function of single rows, x (..., D) -> y (..., D).

    Raises ConfigError for one that wants more arguments, returns something else, or mixes tokens
    (a whole block with its attention).
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        stranger = _stranger(mlp)
        x = _tokens(stranger, d_model)
        y, rows = _called(stranger, mlp, x), _called(stranger, mlp, x.flatten(0, 1))
        turned = _called(stranger, mlp, x.flatten(0, 1).flip(0))
    if y.shape != x.shape or rows.shape != x.flatten(0, 1).shape:
        _refuse(mlp, f"makes {tuple(y.shape)} of {tuple(x.shape)}")
    if not (_agree(rows, y.flatten(0, 1)) and _agree(turned.flip(0), rows)):
        _refuse(mlp, "mixes tokens")


def check_twin(
    layer: nn.Module, d_model: int, twin_of: Callable[[Any], nn.Module], inputs: int = 1
) -> None:
    """Refuse a layer that computes something else once `twin_of` has replaced its MLP by a mixture
    of one expert; `inputs` hidden states (B, L, D) are what it is called with.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        stranger = _stranger(layer)
        x = [_tokens(stranger, d_model) for _ in range(inputs)]
        dense = _called(stranger, layer, *x)
        plugged = _called(twin_of(stranger).eval(), layer, *x)
    if dense.shape != plugged.shape or not _agree(plugged, dense):
        _refuse(layer, "computes something else with experts in the place of its MLP")


def _stranger(module: nn.Module) -> nn.Module:
    """A copy in evaluation and float32 with other weights: zeros hide what is multiplied by them.

    Raises ConfigError for weights on "meta".
    """
    if any(p.is_meta for p in module.parameters()):
        hint = "Plug in once the weights are there."
        reason = f"{type(module).__name__} has weights on 'meta': it cannot be tried"
        raise ConfigError(reason, field="make", hint=hint)
    made = copy.deepcopy(module).eval()
    if any(p.is_floating_point() and p.dtype != torch.float32 for p in made.parameters()):
        made = made.float()
    for parameter in made.parameters():
        if parameter.is_floating_point():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def _tokens(module: nn.Module, d_model: int) -> Tensor:
    parameter = next(module.parameters(), torch.zeros((), device="cpu"))
    return torch.randn(2, 3, d_model, device=parameter.device)


def _called(module: nn.Module, original: nn.Module, *inputs: Tensor) -> Tensor:
    try:
        inspect.signature(module.forward).bind(*inputs)
        y: object = module(*inputs)
    except _FAILURES as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        _refuse(original, f"cannot be called with hidden states {shapes}: {error}", error)
    if not isinstance(y, Tensor):
        _refuse(original, f"returns a {type(y).__name__}")
    return y


def _agree(found: Tensor, expected: Tensor) -> bool:
    gap, size = (found - expected).abs().max(), expected.abs().max()
    return bool(gap <= _TOLERANCE * size)  # False for NaN


def _refuse(module: nn.Module, what: str, cause: Exception | None = None) -> NoReturn:
    reason = f"{type(module).__name__} is no MLP that moezoo knows: it {what[:120]}"
    raise ConfigError(reason, field="make", hint=_HINT) from cause
