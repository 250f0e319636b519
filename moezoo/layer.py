"""The verb: a mixture-of-experts layer is two linear maps around a stack of experts.

y[t] = sum over slots s of  combine[t, s] * f_e(s)( sum over t' of dispatch[t', s] * x[t'] )
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moezoo.capacity.base import CapacityPolicy
from moezoo.component import Component
from moezoo.errors import ConfigError, DtypeError, ShapeError
from moezoo.experts.base import Experts
from moezoo.functional.dispatch import (
    combine,
    dispatch,
    soft_combine,
    soft_dispatch,
    split_weights,
)
from moezoo.ops.eager import autocasts, is_batched, is_eager, is_recorded, is_transformed
from moezoo.ops.observed import is_observed
from moezoo.pairing import check_pair
from moezoo.private_torch import own_parameters
from moezoo.records import Assignment, Routing, SoftAssignment, Tokens
from moezoo.routers.base import Router


class MoE(Component):
    """Router, capacity policy and experts as one layer; takes modules, never names.

    Args:
        router, experts, capacity: the components; their sizes must agree.
        shared: a branch that every token takes besides, x -> y of the same width (DeepSeekMoE).
        group: what capacity is counted over: "batch" (the paper's, per device), "sequence" (the
            last but one dimension of x) or a number of tokens; None: the policy's own, or "batch".

    Raises ConfigError for sizes that disagree, pairs that make no sense and a group that the policy
    cannot follow.
    """

    def __init__(
        self,
        router: Router,
        experts: Experts,
        *,
        capacity: CapacityPolicy | None = None,
        shared: nn.Module | None = None,
        group: str | int | None = None,
    ) -> None:
        super().__init__()
        for part, kind in ((router, Router), (experts, Experts), (capacity, CapacityPolicy)):
            _check_part(part, kind)
        assert capacity is not None
        for size in ("num_experts", "d_model"):
            ours, theirs = getattr(router, size), getattr(experts, size)
            if ours != theirs:
                raise ConfigError(f"router has {size} {ours}, experts have {theirs}", field=size)
        check_pair(router, capacity)
        needed = capacity.required_group
        group = needed or "batch" if group is None else group
        check_group(group)
        if needed is not None and group != needed:
            reason = f"{type(capacity).__name__} counts by {needed}"
            hint = "Leave group out, or choose another capacity policy."
            raise ConfigError(reason, field="group", expected=needed, found=group, hint=hint)
        self.router = router
        self.capacity = capacity
        self.experts = experts
        self.shared = shared
        self.group = group

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, token_ids: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """Send each token through its experts.

        Args:
            x: (..., D) floating.
            mask: (...) bool or integer; False or 0 marks padding, whose output is 0, which takes no
                capacity and counts in no loss.
            token_ids: (...) integer, for routers that route by token.

        Returns:
            y like x, and the Routing: `.assignment` as admitted, `.proposed` as the router's.

        Raises ShapeError, DtypeError or ConfigError naming the argument, and ConfigError under
        `torch.jit.trace`, and under `torch.vmap` for components that the host waits for.
        """
        if not is_eager():
            self._check_transform(x, mask, token_ids)
        tokens = self._tokens(x, mask, token_ids)
        routing = self.route(tokens)
        if isinstance(routing.assignment, SoftAssignment):
            slots = soft_dispatch(tokens.x, routing.assignment)
            y_TD = soft_combine(self.experts(slots.x, slots.counts), routing.assignment)
        elif self._is_alone(tokens.x, routing.assignment):
            y_TD = self._alone(tokens.x, routing.assignment)
        elif (fused_TD := self._fused(tokens.x, routing.assignment)) is not None:
            y_TD = fused_TD
        elif self._weighs_first(tokens.x):
            y_TD = self._weighted(tokens.x, routing.assignment)
        else:
            slots, order = dispatch(tokens.x, routing.assignment)
            y_TD = combine(self.experts(slots.x, slots.counts), routing.assignment, order)
        if self.shared is not None:
            shared_TD = self.shared(tokens.x)
            if tokens.real is not None:
                shared_TD = torch.where(tokens.real[:, None], shared_TD, shared_TD.new_zeros(()))
            y_TD = y_TD + shared_TD
        num_tokens = x.numel() // x.shape[-1]
        if y_TD.shape[0] != num_tokens:  # a slice of everything would still be copied by backward
            y_TD = y_TD[:num_tokens]
        return y_TD.reshape(x.shape).to(x.dtype), routing

    if TYPE_CHECKING:
        __call__ = forward

    def route(self, tokens: Tokens) -> Routing:
        """The router's proposal, admitted by the capacity policy: the seam for replaying a
        trace.
        """
        proposal: Routing = self.router(tokens)
        length, offered = tokens.sequence_length, proposal.assignment
        if isinstance(offered, SoftAssignment):
            return replace(proposal, sequence_length=length)
        routing = replace(proposal, sequence_length=length, proposed=offered)
        admitted = self.router.reweigh(self.capacity(routing))
        return routing if admitted is offered else replace(routing, assignment=admitted)

    def takes_lone_row(self) -> bool:
        """Whether `lone_row` is what `forward` computes: a single token is sure to go through the
        expert that the router says, and nobody looks at the routing.
        """
        if any(module.training or is_observed(module, whole=True) for module in self.modules()):
            return False
        if is_observed(self, "route") or not isinstance(self.experts, Experts):
            return False
        # Not inherited: another `forward` may do otherwise.
        says = "alone" in vars(type(self.router)) and self.router.may_be_alone()
        keeps = vars(type(self.capacity)).get("keeps_one", False)
        return bool(says and keeps) and self.shared is None and not self.experts.is_spread

    def lone_row(self, row: Tensor) -> tuple[Tensor, float]:
        """What the expert of a single token (1, D) in float32 makes of it (1, D), without a
        gradient, and the weight that it has to be multiplied by.
        """
        expert, weight = self.router.alone(row)
        return self.experts.alone(row, expert), weight

    def extra_repr(self) -> str:
        return f"group={self.group!r}"

    def _is_alone(self, x_TD: Tensor, assignment: Assignment) -> bool:
        """Whether one token has one pair that the host may look at, and only a value is wanted."""
        if torch.is_grad_enabled() or not is_eager():
            return False
        if assignment.num_pairs != 1 or assignment.num_tokens != 1:
            return False
        if not isinstance(self.experts, Experts) or self.experts.is_spread:  # somebody looks on
            return False
        plain = type(assignment.expert) is Tensor and assignment.expert.is_cpu
        return plain and not self._weighs_first(x_TD)

    def _weighs_first(self, x_TD: Tensor) -> bool:
        """Whether experts multiply by the weights: they compute in float16, whose range their
        results may leave without them (those of an exact upcycling are E times the layer's).
        """
        kind = x_TD.device.type
        autocast = x_TD.dtype != torch.float64 and autocasts(x_TD)
        dtype = torch.get_autocast_dtype(kind) if autocast else x_TD.dtype
        return dtype == torch.float16 and getattr(self.experts, "takes_weights", False)

    def _weighted(self, x_TD: Tensor, assignment: Assignment) -> Tensor:
        """`dispatch`, experts and `combine`, with the weights where the range is not left."""
        slots, order = dispatch(x_TD, assignment)
        weight_N, rest = split_weights(assignment, order)
        return combine(self.experts(slots.x, slots.counts, weight_N), rest, order)

    def _fused(self, x_TD: Tensor, assignment: Assignment) -> Tensor | None:
        """What a container makes of tokens without rows sorted by expert, if it can."""
        if torch.is_grad_enabled() or not is_eager() or not isinstance(self.experts, Experts):
            return None
        return self.experts.fused(x_TD, assignment)

    def _alone(self, x_TD: Tensor, assignment: Assignment) -> Tensor:
        """`dispatch`, experts and `combine` of one token to decode: nothing to sort."""
        if not bool(assignment.kept):
            return torch.zeros_like(x_TD)
        y_TD = self.experts.alone(x_TD, int(assignment.expert))
        return y_TD * assignment.weight.to(y_TD.dtype)

    def _tokens(self, x: Tensor, mask: Tensor | None, token_ids: Tensor | None) -> Tokens:
        self._check_input(x, mask, token_ids)
        x_TD = x.reshape(-1, x.shape[-1])
        num_tokens = x_TD.shape[0]
        ids_T = None if token_ids is None else token_ids.reshape(-1).long()
        real_T = None if mask is None else mask.reshape(-1).bool()
        if real_T is not None and not self.capacity.counts_padding:
            # Padding may hold anything: as zeros it reaches neither a value nor a gradient.
            x_TD = torch.where(real_T[:, None], x_TD, x_TD.new_zeros(()))
        length = x.shape[-2] if x.dim() > 1 else 1
        if self.group == "batch" or num_tokens == 0:
            return Tokens(x_TD, ids_T, real_T, num_tokens, length)
        if self.group == "sequence":
            return Tokens(x_TD, ids_T, real_T, length, length)
        # Every limit has room for one token, so its group need not be filled up to decode it.
        size = 1 if num_tokens == 1 else int(self.group)
        return filled_up(Tokens(x_TD, ids_T, real_T, num_tokens, length), size)

    def _is_moved(self) -> bool:
        """Whether somebody observes a part, and may bring its weights or rows over (offload)."""
        return any(is_observed(module) for module in self.modules())

    def _check_transform(self, *inputs: Tensor | None) -> None:
        if is_recorded():
            hint = "Use torch.export, or torch.compile."
            reason = "torch.jit.trace keeps the sizes and counts of one batch for every other"
            raise ConfigError(reason, field="x", hint=hint)
        waiting = [part for part in (self.router, self.experts) if getattr(part, "waits", False)]
        if not waiting or not is_transformed():
            return
        state = (*self.router.parameters(), *self.router.buffers())
        if any(map(is_batched, (*inputs, *state))):
            hint = "Loop over the batch, or choose a component that does not wait."
            reason = f"{type(waiting[0]).__name__} waits for a number, torch.vmap has many of it"
            raise ConfigError(reason, field="x", hint=hint)

    def _check_input(self, x: Tensor, mask: Tensor | None, token_ids: Tensor | None) -> None:
        if not x.is_floating_point():
            raise DtypeError("x must be floating", field="x", expected="floating", found=x.dtype)
        if x.is_nested:
            reason = "a layer takes no nested tensor"
            raise ShapeError(reason, field="x", hint="Pad it, and pass a mask.")
        if x.dim() < 1 or x.shape[-1] != self.router.d_model:
            wanted, found = f"(..., {self.router.d_model})", tuple(x.shape)
            raise ShapeError("x has the wrong shape", field="x", expected=wanted, found=found)
        for name, value in (("mask", mask), ("token_ids", token_ids)):
            if value is None:
                continue
            if value.shape != x.shape[:-1]:
                shape = tuple(value.shape)
                wanted = str(tuple(x.shape[:-1]))
                raise ShapeError(f"{name} does not fit x", field=name, expected=wanted, found=shape)
            if value.is_floating_point() or value.is_complex():
                hint = (
                    "Pass True or 1 for real tokens, False or 0 for padding."
                    if name == "mask"
                    else None
                )
                raise DtypeError(
                    f"{name} must be bool or integer", field=name, found=value.dtype, hint=hint
                )
        # A stack of experts at once; else whichever parameter is found, which takes longer.
        parameter = next(iter(own_parameters(self.experts).values()), None)
        parameter = next(self.parameters(), None) if parameter is None else parameter
        if parameter is not None and parameter.device != x.device and not self._is_moved():
            where = f"x on {x.device}, weights on {parameter.device}"
            raise ConfigError("x and the layer are on different devices", field="x", found=where)
        if self.router.needs_token_ids and token_ids is None:
            name = type(self.router).__name__
            raise ConfigError(f"{name} routes by token: it needs token_ids", field="token_ids")


def _check_part(part: object, kind: type[nn.Module]) -> None:
    """Refuse what is no component, most of all its name. Raises ConfigError."""
    if not isinstance(part, kind):
        article = "an" if kind is Experts else "a"
        hint = (
            "moezoo.SparseMLP(d_model, d_ff, num_experts, router=..., capacity=...) takes names; "
            "moezoo.routers, experts and capacity have build(name, ...)."
        )
        reason = f"MoE takes {article} {kind.__name__}, a module"
        raise ConfigError(reason, field=kind.__name__.lower(), found=repr(part)[:80], hint=hint)


def check_group(group: str | int) -> None:
    """Refuse a group that is neither "batch", "sequence" nor a size >= 1. Raises ConfigError."""
    named = isinstance(group, str) and group in ("batch", "sequence")
    sized = isinstance(group, int) and not isinstance(group, bool) and group >= 1
    if not (named or sized):
        wanted = "'batch', 'sequence' or a number of tokens >= 1"
        raise ConfigError("unknown group", field="group", expected=wanted, found=repr(group))


def filled_up(tokens: Tokens, group_size: int) -> Tokens:
    """The tokens in groups of `group_size`, the last one filled up with padding."""
    missing = -tokens.num_tokens % group_size
    if not missing:
        return replace(tokens, group_size=group_size)
    x, ids, real = tokens.x, tokens.ids, tokens.real
    if real is None:
        real = torch.ones(tokens.num_tokens, dtype=torch.bool, device=x.device)
    return Tokens(
        torch.cat([x, x.new_zeros(missing, x.shape[1])]),
        None if ids is None else torch.cat([ids, ids.new_zeros(missing)]),
        torch.cat([real, real.new_zeros(missing)]),
        group_size,
        tokens.sequence_length,
    )
