"""Dispatch, experts and combine in two kernels, for a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from moezoo.errors import ConfigError
from moezoo.functional.activations import Activation, activation
from moezoo.functional.dispatch import dispatch
from moezoo.ops.backends import BACKENDS
from moezoo.records import Assignment

_NAMES: dict[Activation, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    F.silu: "silu",
    activation("gelu-tanh")[0]: "gelu_tanh",
}


def worth_fusing(
    x_TD: Tensor, assignment: Assignment, weights: Sequence[Tensor], function: Activation
) -> bool:
    """Whether `fused_experts` is the fastest and as good: one choice per token, so that sums have
    one order, in half precision on a GPU and outside autocast (benchmarks/gpu.md).
    """
    if not x_TD.is_cuda or x_TD.dtype not in (torch.bfloat16, torch.float16):
        return False
    tensors = (x_TD, *weights)
    known = (Tensor, torch.nn.Parameter)
    plain = all(type(t) in known and t.device == x_TD.device for t in tensors)
    if not plain or any(w.dtype != x_TD.dtype for w in weights) or assignment.choices != 1:
        return False
    apart = torch.is_autocast_enabled("cuda") or function not in _NAMES
    return not apart and BACKENDS["triton"].refusal(x_TD, weights[-1]) is None


def fused_experts(
    x_TD: Tensor,
    assignment: Assignment,
    inner: Sequence[Tensor],
    outer: Tensor,
    *,
    function: Activation,
) -> Tensor:
    """combine(grouped_mlp(dispatch(x))) without the rows sorted by expert, by Triton kernels.

    A layer takes it where `worth_fusing`. No dropout, one derivative; the hidden units are rounded
    to the dtype of x once, after the activation.

    Args:
        x_TD: (T, D) float32, bfloat16 or float16, on a GPU (or in Triton's interpreter).
        inner: one or two (E, F, D). outer: (E, D, F). function: relu, silu or the tanh gelu.

    Returns:
        (T, D), zero for tokens without a kept pair.

    Raises ConfigError for tensors or an activation that the kernels do not know, and where torch is
    told to be deterministic but tokens may have several pairs: these are added up in any order.
    """
    reason = BACKENDS["triton"].refusal(x_TD, outer)
    if reason is not None:
        raise ConfigError(reason, hint="Use dispatch, grouped_mlp and combine.")
    if function not in _NAMES:
        hint = f"They know {', '.join(sorted(set(_NAMES.values())))}."
        raise ConfigError(f"the Triton kernels know no {function}", field="function", hint=hint)
    once = assignment.choices == 1
    if not once and torch.are_deterministic_algorithms_enabled():
        hint = "Use dispatch, grouped_mlp and combine."
        raise ConfigError("the sum over a token's experts is not deterministic", hint=hint)
    from moezoo.ops.triton_mlp import experts_of_tokens

    # Of rows without columns: the order and the counts alone, the kernels gather by themselves.
    slots, order = dispatch(x_TD.detach()[:, :0], assignment)
    token_N, weight_N = order.token, assignment.weight[order.pair]
    name = _NAMES[function]
    return experts_of_tokens(
        x_TD, token_N, weight_N, slots.counts, inner, outer, function=name, once=once
    )
