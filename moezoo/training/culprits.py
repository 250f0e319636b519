"""Where a NaN or an infinity came from: the first weight, layer or gradient that is not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def culprit(model: nn.Module, forwards: Sequence[Callable[[], object]]) -> str:
    """A weight that is not finite, else the first module whose output is not, else the gradient
    that backward met first.

    Args:
        forwards: forward passes to run again, with gradients still in place; random numbers are
            drawn from a copy of the generator.
    """
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            return f"weight {name}"
    with torch.no_grad(), torch.random.fork_rng(), _first_output(model) as found:
        for forward in forwards:
            forward()
            if found:
                return f"output of {found[0]}"
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            return f"gradient of {name}"
    return "the loss alone"


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
