"""Top-1 routing over very many experts: scores come and go in chunks of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from moezoo.functional.assign import best_experts
from moezoo.ops.eager import is_eager, is_followed, plain_gradients
from moezoo.ops.products import product, steady_product

_SCORES = 1 << 18  # of one chunk: 1 MiB in float32


def streamed_top_1(
    x_TD: Tensor, weight: Tensor, bias: Tensor | None, real: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choice (T,), its probability (T,), mean probability (E,) and mean logsumexp^2, the last two
    over real tokens.

    Nothing of size (T, E) is ever held, in backward neither, where each chunk's scores are computed
    again. Where autograd follows that, all scores are held.

    Args:
        x_TD: float32 or float64, finite. weight: (E, D) of the same dtype. bias: (E,) or None.
        real: (T,) bool or None.
    """
    if not is_eager() or x_TD.is_meta:  # which has no chunks
        return top_1_of(torch.nn.functional.linear(x_TD, weight, bias), real)
    share_T = _shares(x_TD, real)
    found: tuple[Tensor, ...] = _Streamed.apply(x_TD, weight, bias, share_T)  # type: ignore[no-untyped-call]
    return found[0], found[1], found[2], found[3]


def top_1_of(logits_TE: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`streamed_top_1` of scores that somebody has computed at once."""
    return _top_1_of(logits_TE, _shares(logits_TE, real))


def _top_1_of(logits_TE: Tensor, share_T: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    probs_TE = logits_TE.softmax(-1)
    expert_T = probs_TE.argmax(-1)
    gate_T = probs_TE.gather(1, expert_T[:, None])[:, 0]
    # A product with a vector has forward-mode gradients of the wrong size where many are taken.
    mean_E = (share_T[:, None] * probs_TE).sum(0)
    return expert_T, gate_T, mean_E, share_T @ logits_TE.logsumexp(-1).square()


def _shares(like: Tensor, real: Tensor | None) -> Tensor:
    """What each token (T,) counts in a mean over real ones."""
    if real is None:
        return like.new_full((like.shape[0],), 1.0 / max(like.shape[0], 1))
    return real.to(like.dtype) / real.sum().clamp(min=1)


def _chunks(num_tokens: int, num_experts: int) -> Iterator[slice]:
    size = max(_SCORES // num_experts, 16)
    for start in range(0, num_tokens, size):
        yield slice(start, min(start + size, num_tokens))


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = steady_product(x, weight)
    return logits if bias is None else logits.add_(bias)


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight: Tensor, bias: Tensor | None, share_T: Tensor
    ) -> tuple[Tensor, ...]:
        num_tokens, num_experts = x_TD.shape[0], weight.shape[0]
        expert_T = torch.empty(num_tokens, dtype=torch.int64, device=x_TD.device)
        gate_T, lse_T = x_TD.new_empty(num_tokens), x_TD.new_empty(num_tokens)
        mean_E = x_TD.new_zeros(num_experts)
        for part in _chunks(num_tokens, num_experts):
            logits = _logits(x_TD[part], weight, bias)
            probs = logits.softmax(-1)
            best = best_experts(probs, 1)
            gate = probs.gather(1, best)
            expert_T[part], gate_T[part] = best[:, 0], gate[:, 0]
            # The best expert's probability is 1 / E or more: its logarithm is as exact as it gets.
            lse_T[part] = (logits.gather(1, best) - gate.log())[:, 0]
            mean_E += share_T[part] @ probs
        ctx.save_for_backward(x_TD, weight, bias, share_T, expert_T, lse_T)
        ctx.mark_non_differentiable(expert_T)
        return expert_T, gate_T, mean_E, share_T @ lse_T.square()

    @staticmethod
    def backward(
        ctx: Any, _: Tensor, grad_gate_T: Tensor, grad_mean_E: Tensor, grad_z: Tensor
    ) -> tuple[Tensor | None, ...]:
        x_TD, weight, bias, share_T, expert_T, lse_T = ctx.saved_tensors
        if is_followed(grad_gate_T):
            return _composed_backward(ctx, (grad_gate_T, grad_mean_E, grad_z))
        grad_x = torch.empty_like(x_TD) if ctx.needs_input_grad[0] else None
        grad_w = torch.zeros_like(weight)
        grad_b = None if bias is None else torch.zeros_like(bias)
        for part in _chunks(x_TD.shape[0], weight.shape[0]):
            logits = _logits(x_TD[part], weight, bias)
            probs = logits.softmax(-1)
            chosen, share = expert_T[part, None], share_T[part, None]
            gate = probs.gather(1, chosen) * grad_gate_T[part, None]
            # softmax: p * (g - sum p g), for g from the mean and from the chosen one's gate;
            # logsumexp^2: p * 2 logsumexp.
            outer = share * (probs @ grad_mean_E)[:, None] + gate
            outer -= share * (2 * grad_z) * lse_T[part, None]
            grad = probs.mul_((share * grad_mean_E).sub_(outer)).scatter_add_(1, chosen, gate)
            if grad_x is not None:
                grad_x[part] = product(grad, weight.t())
            grad_w.addmm_(grad.t(), x_TD[part])
            if grad_b is not None:
                grad_b += grad.sum(0)
        return grad_x, grad_w, grad_b, None


def _composed_backward(
    ctx: Any, grads: Sequence[Tensor]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    """The gradients as a function that autograd can follow, of all scores at once."""
    x_TD, weight, bias, share_T, *_ = ctx.saved_tensors
    inputs = (x_TD, weight) if bias is None else (x_TD, weight, bias)

    def made(x_TD: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
        return _top_1_of(torch.nn.functional.linear(x_TD, weight, bias), share_T)[1:]

    found = plain_gradients(made, inputs, grads, ctx.needs_input_grad[: len(inputs)])
    return found[0], found[1], None if bias is None else found[2], None
