"""The layer that goes into a transformer of your own: names in, one tensor out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from moezoo import experts as expert_containers
from moezoo import routers
from moezoo.assemble import make_capacity, make_shared
from moezoo.component import Component
from moezoo.layer import MoE
from moezoo.pairing import check_causal


class SparseMLP(Component):
    """A mixture of experts in the place of a transformer's MLP: x (..., D) -> y (..., D).

    Args:
        d_model, d_ff, num_experts: sizes of the router and of each expert.
        router, capacity, experts: component names, `{"name": ..., **options}`, or instances;
            `capacity=None` is "switch", or "dropless" for routers that bound the load themselves.
        activation: see `moezoo.functional.activations`.
        dropout: expert dropout, on the hidden units.
        shared: a branch that every token takes besides: a module, or the options of a
            `SharedExpert`, such as `{"d_ff": 64, "gated": True}`.
        group: what capacity is counted over (see `MoE`).
        vocab_size: for routers that route by token id.
        causal: refuse pairs of router and policy that let a token see later ones.

    The router's losses reach you through `moezoo.record`.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_experts: int,
        *,
        router: object = "switch",
        capacity: object | None = None,
        experts: object = "stacked",
        activation: str = "relu",
        dropout: float = 0.0,
        shared: nn.Module | Mapping[str, Any] | None = None,
        group: str | int = "batch",
        vocab_size: int | None = None,
        causal: bool = False,
    ) -> None:
        super().__init__()
        sizes: dict[str, Any] = {"d_model": d_model, "num_experts": num_experts}
        if vocab_size is not None:
            sizes["vocab_size"] = vocab_size
        built = routers.build(router, **sizes)
        policy = make_capacity(capacity, built)
        if causal:
            check_causal(built, policy)
        container = expert_containers.build(
            experts,
            d_model=d_model,
            d_ff=d_ff,
            num_experts=num_experts,
            activation=activation,
            dropout=dropout,
        )
        branch = make_shared(
            shared, d_model=d_model, d_ff=d_ff, activation=activation, dropout=dropout
        )
        self.moe = MoE(built, container, capacity=policy, shared=branch, group=group)

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, token_ids: Tensor | None = None
    ) -> Tensor:
        """y like x; arguments and errors as for `MoE.forward`."""
        y, _ = self.moe(x, mask=mask, token_ids=token_ids)
        return cast(Tensor, y)
