"""Where a NaN or an infinity came from: the first weight, layer or gradient that is not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moezoo.functional.collective import num_ranks
from moezoo.functional.shards import local_of
from moezoo.training.ranks import first_of_ranks


def culprit(model: nn.Module, forwards: Sequence[Callable[[], object]]) -> str:
    """A weight that is not finite, else the first module whose output is not, else the gradient
    that backward met first; where several ranks train, on the first of them that has such a one.

    Args:
        forwards: forward passes to run again, with gradients still in place; random numbers are
            drawn from a copy of the generator.
    """
    gradient = _first_gradient(model)  # a forward pass of FSDP2 leaves other weights in the root
    searches: tuple[Callable[[], str], ...] = (
        lambda: _first_weight(model),
        lambda: _first_module(model, forwards),
        lambda: gradient,
    )
    for search in searches:
        found = first_of_ranks(search())  # every rank runs what another one has to run
        if found:
            return found
    return "the loss alone"


def _first_weight(model: nn.Module) -> str:
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(local_of(parameter)).all()):
            return f"weight {name}"
    return ""


def _first_module(model: nn.Module, forwards: Sequence[Callable[[], object]]) -> str:
    with torch.no_grad(), torch.random.fork_rng(), _first_output(model) as found:
        for forward in forwards:
            forward()
            if found and num_ranks() == 1:
                break
    return f"output of {found[0]}" if found else ""


def _first_gradient(model: nn.Module) -> str:
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not bool(torch.isfinite(local_of(parameter.grad)).all()):
            return f"gradient of {name}"
    return ""


@contextmanager
def _first_output(model: nn.Module) -> Iterator[list[str]]:
    """Names of modules whose output is not finite, in the order in which they finish."""
    found: list[str] = []

    def watcher(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            parts = output if isinstance(output, tuple) else (output,)
            for part in parts:
                if isinstance(part, Tensor) and _bad(part):
                    found.append(name or "the model")

        return hook

    handles = [
        module.register_forward_hook(watcher(name)) for name, module in model.named_modules()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _bad(tensor: Tensor) -> bool:
    """NaN anywhere, or plus infinity; minus infinity masks attention on purpose."""
    return tensor.is_floating_point() and not bool((tensor < torch.inf).all())
