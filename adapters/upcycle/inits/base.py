"""What an expert initialisation is, and the registry of them."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from moezoo.errors import ConfigError
from moezoo.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    Matrices = Mapping[str, Tensor]
else:
    Matrices = Mapping


class ExpertInit(abc.ABC):
    """How the experts of one layer come from dense feed-forward matrices.

    Matrices are named `wi` (or `wi_0`, `wi_1`) of shape (F, D) and `wo` of shape (D, F). Options of
    an initialisation are the keyword arguments of its `__init__`.

    Attributes:
        exact: with equal gate weights and the scale of `preservation`, the layer computes what the
            dense one did.
        streams: every expert is the dense matrices or slices of them (`part`), so that bytes
            suffice.
        sums_slices: the chosen experts of a token are slices that add up to the dense layer, not
            alternatives of which each is the whole.
    """

    exact = False
    streams = False
    sums_slices = False

    @abc.abstractmethod
    def expert(
        self, dense: Sequence[Matrices], index: int, num_experts: int, *, key: str, seed: int
    ) -> dict[str, Tensor]:
        """The matrices of expert `index`, before any scale, in the dtype of the dense ones.

        Args:
            dense: the dense layer, or one per branch.
            key: the layer's name, such as "encoder.blocks.1.mlp"; random numbers depend on it, on
                `seed` and on the matrix, and on nothing else.
        """

    def part(self, index: int, num_experts: int) -> tuple[int, int]:
        """Where `streams`: which slice of the hidden units expert `index` is, and of how many."""
        return 0, 1

    def check(self, d_ff: int, num_experts: int) -> None:
        """Raise ConfigError where this initialisation cannot serve these sizes."""
        if num_experts < 1:
            raise ConfigError("num_experts must be at least 1", field="num_experts")

    def expert_width(self, d_ff: int, num_experts: int) -> int:
        """The hidden width of one expert."""
        return d_ff

    def choices(self, num_experts: int) -> int | None:
        """How many experts a token must choose, or None where any number will do."""
        return None

    def router_rows(self, num_experts: int) -> list[int]:
        """For each expert, which row of the router it takes; equal numbers are equal rows."""
        return list(range(num_experts))


expert_inits: Registry[ExpertInit] = Registry(
    "initialisation",
    ExpertInit,  # type: ignore[type-abstract]
    "moezoo.upcycle_inits",
)


def slices_of(dense: Matrices, index: int, count: int) -> dict[str, Tensor]:
    """Slice `index` of `count` equal ones along the hidden width; all of them add up to `dense`."""
    width = dense["wo"].shape[1] // count
    here = slice(index * width, (index + 1) * width)
    return {
        name: (matrix[:, here] if name == "wo" else matrix[here]).contiguous()
        for name, matrix in dense.items()
    }


def check_share(name: str, value: float, *, below_one: bool = False) -> None:
    """Raise ConfigError unless 0 <= value (<= 1 when `below_one`)."""
    if not 0.0 <= value <= (1.0 if below_one else 1e6):
        wanted = "a number in [0, 1]" if below_one else "a number >= 0"
        raise ConfigError(f"{name} is out of range", field=name, expected=wanted, found=value)
