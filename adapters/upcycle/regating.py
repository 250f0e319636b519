"""What fewer experts change about the weights that a router gives, and how `wo` makes up for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moezoo.adapters.checkpoint_source import CheckpointSource
from moezoo.adapters.families import DecoderConfig
from moezoo.adapters.formats.base import torch_dtype
from moezoo.adapters.upcycle.keyed import keyed_generator
from moezoo.adapters.upcycle.likeness import Group
from moezoo.assemble import make_router
from moezoo.config import SwitchConfig
from moezoo.records import Assignment, Tokens
from moezoo.traces import Trace

_TOKENS, _TOKENS_PER_EXPERT = 2048, 64
# How far from equal the draws leave rows that upcycling and growing made alike: in their own scale,
# and in epsilons of their dtype.
_NOISE, _ROUNDING = 1e-5, 8.0


def shares(group: Sequence[int], use: Tensor) -> Tensor:
    """The part (n,) that each member has in a group's mean, by use; float64, sums to 1."""
    part = use[list(group)].double()
    return part / part.sum()


def wo_factors(
    checkpoint: CheckpointSource,
    layer: str,
    groups: Sequence[Group],
    use: Tensor,
    trace: Trace | None = None,
) -> list[float]:
    """The factor on `wo` of each new expert that keeps the weighted output of its old ones.

    A new expert's row is the mean of its members', so its logit is the mean of theirs. With w what
    a token's weights added up to and v what they add up to now, the factor is the s in (0, 1] that
    brings s v nearest to w, over tokens that went to a member and go to the new expert: 1 / n for n
    members of equal rows, who shared one probability; 1 for members that are sure of their own
    tokens; less than 1 for whoever is weighed higher since others are gone. It is at most 1, so
    that no output moves further away than it would without the factor.

    Tokens are those of a trace that holds probabilities, else drawn as the layer's norm gives them,
    in every direction alike. Routers that look at other tokens too get factors of 1.
    """
    config = checkpoint.config
    if isinstance(config, DecoderConfig):
        return [1.0] * len(groups)  # whatever is chosen, its weights add up to 1
    assert isinstance(config, SwitchConfig)
    old_TE = _logits(checkpoint, layer, trace)
    means = torch.zeros(config.num_experts, len(groups), dtype=torch.float64, device="cpu")
    for index, group in enumerate(groups):
        means[list(group), index] = shares(group, use)
    before_TE, after_TG = _weights(old_TE, config), _weights(old_TE @ means, config)
    if before_TE is None or after_TG is None:
        return [1.0] * len(groups)
    even = len(groups) / config.num_experts
    dtype = torch_dtype(checkpoint.tensors[f"{layer}.router.classifier.weight"][0].dtype)
    tolerance = max(_NOISE, _ROUNDING * torch.finfo(dtype).eps)
    found = []
    for index, group in enumerate(groups):
        both_T = (before_TE[:, list(group)] > 0).any(1) & (after_TG[:, index] > 0)
        best = _nearest(before_TE[both_T].sum(1), after_TG[both_T].sum(1))
        found.append(even if abs(best / even - 1.0) <= tolerance else best)
    return found


def _nearest(before_T: Tensor, after_T: Tensor) -> float:
    """The s <= 1 that minimises the sum of (s after - before)^2; 1 for no tokens."""
    if not before_T.numel():
        return 1.0
    return min(float((before_T * after_T).sum() / after_T.square().sum()), 1.0)


def _weights(logits_TE: Tensor, config: SwitchConfig) -> Tensor | None:
    """What the config's router weighs every expert (T, E) by, given scores; 0: not chosen. None
    for routers that need more than a token's own scores.

    Raises ConfigError for a router that chooses more experts than there are.
    """
    count = logits_TE.shape[1]
    config = config.replace(d_model=count, num_experts=count, router_bias=False)
    with torch.device("cpu"):
        router = make_router(config.router, config)
    if not router.causal:
        return None
    router = router.double().eval()
    with torch.no_grad():
        router.get_parameter("classifier.weight").copy_(torch.eye(count, device="cpu"))
        pairs = router(Tokens(logits_TE)).assignment
        assert isinstance(pairs, Assignment)
        pairs = router.reweigh(pairs)
        weights = torch.zeros_like(logits_TE)
        return weights.index_put_((pairs.token, pairs.expert), pairs.weight, accumulate=True)


def _logits(checkpoint: CheckpointSource, layer: str, trace: Trace | None) -> Tensor:
    """Scores (T, E) of tokens, float64, up to what is common to a token's experts."""
    calls = () if trace is None else trace.by_layer[layer]
    seen = [
        call.probs if call.real is None else call.probs[call.real]
        for call in calls
        if call.probs is not None
    ]
    if seen and sum(len(probs) for probs in seen):
        probs = torch.cat(seen).double()
        return probs.clamp(min=torch.finfo(torch.float32).tiny).log()
    rows, norm = (
        checkpoint.source.tensor(checkpoint.tensors[name][0].name).double()
        for name in (f"{layer}.router.classifier.weight", f"{layer}_norm.weight")
    )
    count = max(_TOKENS, _TOKENS_PER_EXPERT * len(rows))
    generator = keyed_generator(0, f"{layer}.shrink")
    x_TD = torch.randn(count, rows.shape[1], generator=generator, dtype=torch.float64, device="cpu")
    x_TD = x_TD / x_TD.square().mean(-1, keepdim=True).sqrt() * norm
    logits_TE = x_TD @ rows.T
    bias = checkpoint.tensors.get(f"{layer}.router.classifier.bias")
    return logits_TE if bias is None else logits_TE + checkpoint.source.tensor(bias[0].name)
