"""Registered ways to draw the router of an upcycled layer."""

from __future__ import annotations

import abc
from array import array
from typing import TYPE_CHECKING

from moezoo.adapters.upcycle.keyed import keyed_generator, keyed_normals
from moezoo.errors import ConfigError
from moezoo.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# The exact default, as the deviation of a layer's logits: small enough that E times the winning
# probability is 1 to 5e-6 at any width, large enough that tokens still spread evenly. The error is
# linear in the deviation, the balance does not depend on it.
EXACT_LOGIT_STD = 2e-6


class RouterInit(abc.ABC):
    """How the rows (E, D) of a layer's router are drawn.

    Attributes:
        needs_inputs: `rows` needs what the layer reads on sample text (a calibration pass).
    """

    needs_inputs = False

    @abc.abstractmethod
    def rows(
        self,
        num_experts: int,
        d_model: int,
        *,
        key: str,
        seed: int,
        inputs: Tensor | None = None,
        experts: Tensor | None = None,
    ) -> array[float]:
        """The router's weight, row-major, float32.

        Args:
            key: the layer's name; random numbers depend on it and on `seed` alone.
            inputs: (T, D) float32, the layer's inputs on sample text.
            experts: (T,) int64, the expert whose prompt each token is of, for prompts; -1 - e of
                one that is of what expert e is not for.
        """


router_inits: Registry[RouterInit] = Registry(
    "router initialisation",
    RouterInit,  # type: ignore[type-abstract]
    "moezoo.router_inits",
)


@router_inits.register("normal")
class NormalRouter(RouterInit):
    """N(0, std^2). The default is tiny (2e-6 / sqrt(D)): tokens spread evenly and the gate is 1/E
    to 5e-6.
    """

    def __init__(self, std: float | None = None) -> None:
        _check_std(std)
        self.std = std

    def rows(
        self,
        num_experts: int,
        d_model: int,
        *,
        key: str,
        seed: int,
        inputs: Tensor | None = None,
        experts: Tensor | None = None,
    ) -> array[float]:
        return keyed_normals(seed, f"{key}.router", num_experts * d_model, _std(self.std, d_model))


@router_inits.register("zero")
class ZeroRouter(RouterInit):
    """All zero: the gate is exactly 1/E, but every token goes to expert 0 until trained."""

    def rows(
        self,
        num_experts: int,
        d_model: int,
        *,
        key: str,
        seed: int,
        inputs: Tensor | None = None,
        experts: Tensor | None = None,
    ) -> array[float]:
        return array("f", bytes(4 * num_experts * d_model))


@router_inits.register("mean_orthogonal")
class MeanOrthogonalRouter(RouterInit):
    """Normal rows made orthogonal to the mean input, w <- w - (w.mu) mu / |mu|^2.

    A common mean of the activations would otherwise send most tokens to one expert.
    """

    needs_inputs = True

    def __init__(self, std: float | None = None) -> None:
        _check_std(std)
        self.std = std

    def rows(
        self,
        num_experts: int,
        d_model: int,
        *,
        key: str,
        seed: int,
        inputs: Tensor | None = None,
        experts: Tensor | None = None,
    ) -> array[float]:
        import torch

        inputs = _inputs(inputs, key)
        draws = keyed_normals(seed, f"{key}.router", num_experts * d_model, _std(self.std, d_model))
        rows = torch.tensor(draws, dtype=torch.float64, device="cpu").view(num_experts, d_model)
        mean = inputs.double().mean(dim=0)
        square = mean.dot(mean).clamp(min=torch.finfo(torch.float64).tiny)
        return _flat(rows - (rows @ mean)[:, None] * mean / square)


@router_inits.register("centroids")
class CentroidsRouter(RouterInit):
    """Rows point at the centroids of the layer's inputs (spherical k-means on sample text).

    Args:
        std: root mean square of the rows. steps: rounds of k-means.
    """

    needs_inputs = True

    def __init__(self, std: float | None = None, steps: int = 10) -> None:
        _check_std(std)
        self.std, self.steps = std, steps

    def rows(
        self,
        num_experts: int,
        d_model: int,
        *,
        key: str,
        seed: int,
        inputs: Tensor | None = None,
        experts: Tensor | None = None,
    ) -> array[float]:
        import torch
        from torch.nn.functional import normalize

        inputs = _inputs(inputs, key)
        if len(inputs) < num_experts:
            raise ConfigError(
                "centroids need at least one sample token per expert",
                field="calibration",
                expected=f">= {num_experts} tokens",
                found=len(inputs),
            )
        points = normalize(inputs.double() - inputs.double().mean(dim=0), dim=1)
        centres = _spread_out(points, num_experts, keyed_generator(seed, f"{key}.router"))
        for _ in range(self.steps):
            member = (points @ centres.T).argmax(dim=1)
            sums = torch.zeros_like(centres).index_add_(0, member, points)
            empty = torch.bincount(member, minlength=num_experts) == 0
            centres = normalize(torch.where(empty[:, None], centres, sums), dim=1)
        return _flat(centres * (_std(self.std, d_model) * d_model**0.5))


@router_inits.register("prompts")
class PromptsRouter(RouterInit):
    """Row e points from the mean input to the inputs of expert e's own prompts, so that text like
    theirs goes there, and away from those of its negative prompts, where it has some.

    Args:
        std: root mean square of the rows.
    """

    needs_inputs = True

    def __init__(self, std: float | None = None) -> None:
        _check_std(std)
        self.std = std

    def rows(
        self,
        num_experts: int,
        d_model: int,
        *,
        key: str,
        seed: int,
        inputs: Tensor | None = None,
        experts: Tensor | None = None,
    ) -> array[float]:
        import torch
        from torch.nn.functional import normalize

        inputs = _inputs(inputs, key).double()
        experts = torch.empty(0, dtype=torch.int64, device="cpu") if experts is None else experts
        counts = torch.bincount(experts[experts >= 0], minlength=num_experts)
        known = not len(experts) or int(experts.min()) >= -num_experts
        if len(counts) != num_experts or not bool((counts > 0).all()) or not known:
            raise ConfigError(
                "prompts are needed for every expert, and for no others",
                field="calibration",
                expected=f"prompts for experts 0 to {num_experts - 1}",
                found=f"prompts for {int((counts > 0).sum())}",
                hint="Pass a JSON file: a list with one list of texts per expert.",
            )
        means = _means(inputs, experts, num_experts)
        means = means - _means(inputs, -1 - experts, num_experts)
        directions = normalize(means - means.mean(dim=0), dim=1)
        return _flat(directions * (_std(self.std, d_model) * d_model**0.5))


def _means(inputs: Tensor, owners: Tensor, num_experts: int) -> Tensor:
    """The mean input (E, D) of each expert's tokens, zero without any; negative owners are none."""
    import torch

    ours = owners >= 0
    sums = torch.zeros(num_experts, inputs.shape[1], dtype=torch.float64, device="cpu")
    counts = torch.bincount(owners[ours], minlength=num_experts).clamp(min=1)
    return sums.index_add_(0, owners[ours], inputs[ours]) / counts[:, None]


def _spread_out(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """A random point, then again and again the one that is least like those taken."""
    import torch

    first = int(torch.randint(len(points), (1,), generator=generator, device="cpu"))
    taken = [first]
    likeness = points @ points[first]
    for _ in range(count - 1):
        taken.append(int(likeness.argmin()))
        likeness = likeness.maximum(points @ points[taken[-1]])
    return points[taken]


def _inputs(inputs: Tensor | None, key: str) -> Tensor:
    if inputs is None or inputs.numel() == 0:
        raise ConfigError(
            f"this router initialisation needs sample text for {key}",
            field="calibration",
            hint="Pass calibration=..., or use router_init='normal'.",
        )
    return inputs


def _flat(rows: Tensor) -> array[float]:
    values: list[float] = rows.flatten().tolist()
    return array("f", values)


def _std(given: float | None, d_model: int) -> float:
    return float(EXACT_LOGIT_STD / d_model**0.5) if given is None else given


def _check_std(std: float | None) -> None:
    if std is not None and not 0.0 <= std < 1e3:
        raise ConfigError("std must be a number >= 0", field="std", found=std)
