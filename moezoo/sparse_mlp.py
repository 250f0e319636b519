"""The layer that goes into a transformer of your own: names in, one tensor out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from moezoo import experts as expert_containers
from moezoo import routers
from moezoo.assemble import make_capacity, make_shared
from moezoo.component import Component
from moezoo.errors import ConfigError
from moezoo.experts.base import Experts
from moezoo.layer import MoE
from moezoo.pairing import check_causal


class SparseMLP(Component):
    """A mixture of experts in the place of a transformer's MLP: x (..., D) -> y (..., D).

    Args:
        d_model, d_ff, num_experts: sizes of the router and of each expert; d_ff None beside experts
            that are an instance.
        router, capacity, experts: component names, `{"name": ..., **options}`, or instances;
            `capacity=None` is "switch", or "dropless" for routers that bound the load themselves.
        activation: see `moezoo.functional.activations`; None: relu.
        dropout: expert dropout, on the hidden units; None: 0.
        shared: a branch that every token takes besides: a module, or the options of a
            `SharedExpert`, such as `{"d_ff": 64, "gated": True}`.
        group: what capacity is counted over (see `MoE`).
        vocab_size: for routers that route by token id.
        causal: refuse pairs of router and policy that let a token see later ones.
        batch_first: x of three dimensions is (B, L, D); False: (L, B, D), as in torch's modules.

    The router's losses reach you through `moezoo.record`. Raises ConfigError for what does not fit,
    and for options of experts beside an instance, which would not follow them.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int | None,
        num_experts: int,
        *,
        router: object = "switch",
        capacity: object | None = None,
        experts: object = "stacked",
        activation: str | None = None,
        dropout: float | None = None,
        shared: nn.Module | Mapping[str, Any] | None = None,
        group: str | int | None = None,
        vocab_size: int | None = None,
        causal: bool = False,
        batch_first: bool = True,
    ) -> None:
        super().__init__()
        self.batch_first = batch_first
        sizes: dict[str, Any] = {"d_model": d_model, "num_experts": num_experts}
        if vocab_size is not None:
            sizes["vocab_size"] = vocab_size
        built = routers.build(router, **sizes)
        policy = make_capacity(capacity, built)
        if causal:
            check_causal(built, policy)
        given: dict[str, Any] = {"d_ff": d_ff, "activation": activation, "dropout": dropout}
        if isinstance(experts, Experts) and not isinstance(shared, Mapping):
            _refuse_beside(experts, given)
        given = {
            "d_ff": d_ff,
            "activation": "relu" if activation is None else activation,
            "dropout": 0.0 if dropout is None else dropout,
        }
        container = expert_containers.build(
            experts, d_model=d_model, num_experts=num_experts, **given
        )
        branch = make_shared(shared, d_model=d_model, **given)
        self.moe = MoE(built, container, capacity=policy, shared=branch, group=group)

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, token_ids: Tensor | None = None
    ) -> Tensor:
        """y like x; arguments and errors as for `MoE.forward`; mask and token_ids are (B, L) also
        where x is (L, B, D).
        """
        turned = not self.batch_first and x.dim() == 3
        y, _ = self.moe(x.transpose(0, 1) if turned else x, mask=mask, token_ids=token_ids)
        return y.transpose(0, 1) if turned else y

    if TYPE_CHECKING:
        __call__ = forward


def _refuse_beside(experts: Experts, given: Mapping[str, Any]) -> None:
    """Refuse options of experts that are made already, but for what they are."""
    for name, value in given.items():
        if value is not None and getattr(experts, name, None) != value:
            hint = f"Leave {name} out (d_ff: None), or pass the experts by name."
            reason = f"{name} is not followed beside experts that are an instance"
            raise ConfigError(reason, field=name, found=repr(value), hint=hint)
