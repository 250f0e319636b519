"""What a model returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from moezoo.models.cache import DecoderCache
from moezoo.private_torch import is_seen_through
from moezoo.records import Routing


@is_seen_through
@dataclass(frozen=True)
class SwitchOutput:
    """Results of one forward pass; what a task does not compute is None.

    logits (B, L, V). loss: cross entropy plus the configured router losses. losses: its parts,
    unweighted: "cross_entropy" when labels were given, and each configured router loss as the mean
    over sparse layers. last_hidden_state (B, L, D) of the last stack that ran;
    encoder_last_hidden_state (B, Ls, D). routing: one Routing per sparse layer, encoder first.
    past_key_values: the decoder's keys and values, when asked for.
    """

    logits: Tensor | None = None
    loss: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    last_hidden_state: Tensor | None = None
    encoder_last_hidden_state: Tensor | None = None
    routing: tuple[Routing, ...] = ()
    past_key_values: DecoderCache | None = None


@dataclass(frozen=True)
class Generated:
    """Sequences (B * n, L) of target ids and how they were scored.

    scores: for each generated token the scores (R, V) after all rules; R = B * n, or B * num_beams
    for beam search, whose scores are log probabilities. sequences_scores (B * n,): the sum of the
    tokens' log probabilities by these; of beam search over length ** length_penalty, which ranks
    beams. beam_indices (B * n, steps): of beam search, the row of `scores` that each token came
    from, -1 after the end.
    """

    sequences: Tensor
    scores: tuple[Tensor, ...] = ()
    sequences_scores: Tensor | None = None
    beam_indices: Tensor | None = None
