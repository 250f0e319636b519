"""What a module is taken for is tried: dense and plugged must agree on tokens that nobody chose."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from moezoo.errors import ConfigError
from moezoo.ops.observed import is_plain_tensor
from moezoo.sparse_mlp import SparseMLP

_TOLERANCE = 1e-4
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_FAILURES = (TypeError, ValueError, RuntimeError, IndexError, AttributeError, AssertionError)
_PATCHED = "Its forward is patched: take the patch or the hooks off, and put them on again then."
_HINT = "Choose its MLP, or pass a `make` of your own that returns a moezoo.SparseMLP."


def check_row_wise(mlp: nn.Module, d_model: int) -> None:
    """Refuse a module that is no function of single rows, x (..., D) -> y (..., D).

    Raises ConfigError for one that wants more arguments, returns something else, or mixes tokens
    (a whole block with its attention).
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        stranger = stranger_of(mlp)
        x = _tokens(stranger, d_model)
        y, rows = called(stranger, mlp, x), called(stranger, mlp, x.flatten(0, 1))
        turned = called(stranger, mlp, x.flatten(0, 1).flip(0))
        _check_copy(stranger, mlp, x)
    if y.shape != x.shape or rows.shape != x.flatten(0, 1).shape:
        _refuse(mlp, f"makes {tuple(y.shape)} of {tuple(x.shape)}")
    if not (_agree(rows, y.flatten(0, 1)) and _agree(turned.flip(0), rows)):
        _refuse(mlp, "mixes tokens")


def check_sum(mlp: nn.Module, d_model: int) -> None:
    """Refuse a module that does anything with its second argument but to add it: `check_row_wise`
    for f(x, residual) = g(x) + residual. Raises ConfigError.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        stranger = stranger_of(mlp)
        x, residual = _tokens(stranger, d_model), _tokens(stranger, d_model)
        nothing = torch.zeros_like(x)
        y = called(stranger, mlp, x, nothing)
        rows = called(stranger, mlp, x.flatten(0, 1).flip(0), nothing.flatten(0, 1))
        whole = called(stranger, mlp, x, residual)
        _check_copy(stranger, mlp, x, residual)
    if y.shape != x.shape or rows.shape != x.flatten(0, 1).shape:
        _refuse(mlp, f"makes {tuple(y.shape)} of {tuple(x.shape)}")
    if not _agree(rows.flip(0), y.flatten(0, 1)):
        _refuse(mlp, "mixes tokens")
    if not _agree(whole, y + residual):
        _refuse(mlp, "does more with its second argument than to add it")


def check_twin(
    layer: nn.Module, d_model: int, twin_of: Callable[[Any], nn.Module], inputs: int = 1
) -> None:
    """Refuse a layer that computes something else once `twin_of` has replaced its MLP by a mixture
    of one expert, or drops out elsewhere; `inputs` hidden states (B, L, D) are what it is called
    with.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        stranger = stranger_of(layer)
        x = [_tokens(stranger, d_model) for _ in range(inputs)]
        dense = called(stranger, layer, *x, whole=False)
        twin, seen = twin_of(stranger).eval(), []
        for part in twin.modules():
            if isinstance(part, SparseMLP):
                part.register_forward_hook(lambda *_: seen.append(1))
        plugged = called(twin, layer, *x, whole=False)
        for part in stranger.modules():
            if isinstance(part, nn.Dropout):
                part.register_forward_hook(_mark)
        dropped, trained = (called(one, layer, *x, whole=False) for one in (stranger, twin))
    if not seen:
        _refuse(layer, "does not call what is put in the place of its MLP", hint=_PATCHED)
    if dense.shape != plugged.shape or not _agree(plugged, dense):
        _refuse(layer, "computes something else with experts in the place of its MLP")
    if dropped.shape != trained.shape or not _agree(trained, dropped):
        _refuse(layer, "drops out elsewhere with experts in the place of its MLP")


def _mark(module: nn.Module, args: object, out: Tensor) -> Tensor:
    """A change that no linear map passes on as it is."""
    return out * torch.linspace(1.0, 2.0, out.shape[-1], dtype=out.dtype, device=out.device)


def _check_copy(stranger: nn.Module, mlp: nn.Module, *inputs: Tensor) -> None:
    """Refuse a module whose copy computes with the weights of the module itself."""
    weights = [p for p in mlp.parameters() if p.requires_grad]
    with torch.enable_grad():
        y = called(stranger, mlp, *inputs)
        found = torch.autograd.grad(y.sum(), weights, allow_unused=True) if y.requires_grad else ()
    if any(gradient is not None for gradient in found):
        _refuse(mlp, "computes with the same weights when it is copied", hint=_PATCHED)


def stranger_of(module: nn.Module) -> nn.Module:
    """A copy of a module in evaluation and float32 with other weights: zeros hide what is
    multiplied by them.

    Raises ConfigError for weights on "meta", quantised ones, and those that are made of others.
    """
    _check_weights(module)
    made = copy.deepcopy(module).eval()
    if any(p.is_floating_point() and p.dtype != torch.float32 for p in made.parameters()):
        made = made.float()
    for parameter in made.parameters():
        if parameter.is_floating_point():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def _check_weights(module: nn.Module) -> None:
    """Refuse a module of which no copy with other weights can be made. Raises ConfigError."""
    found, kind = dict(module.named_parameters()), type(module).__name__
    if any(p.is_meta for p in found.values()):
        hint = "Plug in once the weights are there."
        raise ConfigError(
            f"{kind} has weights on 'meta': it cannot be tried", field="make", hint=hint
        )
    if any(map(is_lazy, found.values())):
        hint = "Call the model once before."
        raise ConfigError(f"{kind} has weights without a shape", field="make", hint=hint)
    for name, p in found.items():
        coded = p.is_floating_point() and p.dtype not in _DTYPES
        if coded or not is_plain_tensor(p):
            what = p.dtype if coded else type(p).__name__
            hint = "Plug first, and quantise then."
            reason = f"{name!r} of {kind} is quantised ({what}): it cannot be tried"
            raise ConfigError(reason, field="make", hint=hint)
    for part in module.modules():
        for name, value in vars(part).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                hint = "Make it permanent: prune.remove, or remove_weight_norm, of torch.nn.utils."
                reason = f"{name!r} of {type(part).__name__} is computed from other weights"
                raise ConfigError(reason, field="make", hint=hint)


def _left_out(signature: inspect.Signature, given: int) -> dict[str, None]:
    """None for the required arguments of a layer past its hidden states: masks, as a rule."""
    named = list(signature.parameters.values())[given:]
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name: None for p in named if p.default is p.empty and p.kind in kinds}


def _tokens(module: nn.Module, d_model: int) -> Tensor:
    parameter = next(module.parameters(), torch.zeros((), device="cpu"))
    return torch.randn(2, 3, d_model, device=parameter.device)


def called(module: nn.Module, original: nn.Module, *inputs: Tensor, whole: bool = True) -> Tensor:
    """What a module makes of hidden states; not `whole`: the first of what it returns, with None
    for whatever else it wants. Raises ConfigError naming the class of `original`.
    """
    signature = inspect.signature(module.forward)
    try:
        more = {} if whole else _left_out(signature, len(inputs))
        signature.bind(*inputs, **more)
        y: object = module(*inputs, **more)
    except _FAILURES as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        _refuse(original, f"cannot be called with hidden states {shapes}: {error}", error)
    if not whole and isinstance(y, tuple) and y:
        y = y[0]
    if not isinstance(y, Tensor):
        _refuse(original, f"returns a {type(y).__name__}")
    return y


def _agree(found: Tensor, expected: Tensor) -> bool:
    gap, size = (found - expected).abs().max(), expected.abs().max()
    return bool(gap <= _TOLERANCE * size)  # False for NaN


def _refuse(
    module: nn.Module, what: str, cause: Exception | None = None, hint: str = _HINT
) -> NoReturn:
    reason = f"{type(module).__name__} is no MLP that moezoo knows: it {what[:120]}"
    raise ConfigError(reason, field="make", hint=hint) from cause
