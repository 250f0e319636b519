"""Beam search on tensors: once a step, one number comes back to the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moezoo.generation_options import GenerationOptions
from moezoo.models.next_token import NextToken
from moezoo.models.output import Generated
from moezoo.models.sampling import drawn

_NEVER = -1e9  # added to the score of what cannot win: the order among such stays


def beam_search(next_token: NextToken, ids: Tensor, options: GenerationOptions) -> Generated:
    """The num_return_sequences best of num_beams sequences per source, padded after their end.

    Args:
        ids: (B * K, L) what the decoder begins with, the K beams of a source side by side.

    (number of ends + 1) * K candidates are taken or drawn per step, so that K go on even if as many
    end; a candidate that ends outside of the best K is lost. As in transformers, ties included.
    """
    beams, longest = options.num_beams, next_token.longest
    sources, prompt = ids.shape[0] // beams, ids.shape[1]
    running = _Paths.of(ids.view(sources, beams, prompt), longest, next_token.pad)
    done = _Done.none(running)
    # All beams start equal: only the first may speak, or all would say the same.
    total_BK = torch.full((sources, beams), _NEVER, device=ids.device)
    total_BK[:, 0] = 0.0
    first_B1 = torch.arange(sources, device=ids.device)[:, None] * beams
    for length in range(prompt + 1, longest + 1):
        scores = next_token.scores(running.until(length - 1), log_probs=True)
        joint = (total_BK.view(-1, 1) + scores).view(sources, -1)
        values, flat = _candidates(joint, options, next_token.generator)
        beam, token = flat // scores.shape[1], flat % scores.shape[1]
        grown = running.taken(beam)
        grown.ids[:, :, length - 1], grown.rows[:, :, length - 1] = token, beam + first_B1
        ends = next_token.ended(grown.until(length)).view(values.shape)
        going_on = values + ends * _NEVER
        kept = going_on.topk(beams, dim=1).indices
        total_BK, running = going_on.gather(1, kept), grown.taken(kept)
        next_token.reorder((beam + first_B1).gather(1, kept).flatten())
        done = done.with_ended(grown, values, ends, options, length - prompt)
        likely = options.early_stopping != "never" or options.length_penalty <= 0
        best = total_BK[:, :1] / _length_factor((length if likely else longest) - prompt, options)
        done = done.closed(best)
        if not bool(done.may_improve(options) & ~ends.all()):
            break
    return done.best(options.num_return_sequences, prompt, next_token.recorded)


def _candidates(
    joint: Tensor, options: GenerationOptions, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Log probabilities (B, C) and places of the candidates among joint ones (B, K * V)."""
    count = max(2, 1 + len(options.eos_token_ids)) * options.num_beams
    count = min(count, joint.shape[1])
    if not options.do_sample:
        values, flat = joint.topk(count, dim=1)
        return values, flat
    flat = drawn(joint, count, generator)
    return joint.gather(1, flat), flat


def _length_factor(generated: int, options: GenerationOptions) -> float:
    factor: float = generated**options.length_penalty
    return factor


@dataclass(frozen=True)
class _Paths:
    """Sequences of each source: ids (B, n, longest), padded, and of each generated token the row
    (B, n, longest) that it continued, -1 elsewhere.
    """

    ids: Tensor
    rows: Tensor

    @staticmethod
    def of(prompt: Tensor, longest: int, pad: int) -> _Paths:
        ids = prompt.new_full((*prompt.shape[:2], longest), pad)
        ids[:, :, : prompt.shape[2]] = prompt
        return _Paths(ids, torch.full_like(ids, -1))

    def until(self, length: int) -> Tensor:
        """The first ids of all (B * n, length)."""
        return self.ids[:, :, :length].flatten(0, 1)

    def taken(self, index: Tensor) -> _Paths:
        """Copies of the given ones (B, m) of each source."""
        return _Paths(_along(self.ids, index), _along(self.rows, index))

    def beside(self, other: _Paths) -> _Paths:
        return _Paths(torch.cat([self.ids, other.ids], 1), torch.cat([self.rows, other.rows], 1))


@dataclass(frozen=True)
class _Done:
    """The best K complete sequences of each source, best first: their scores (B, K), whether there
    is one (B, K), and whether a running beam may still enter (B, 1).
    """

    paths: _Paths
    scores_BK: Tensor
    there_BK: Tensor
    open_B1: Tensor

    @staticmethod
    def none(paths: _Paths) -> _Done:
        scores = torch.full(paths.ids.shape[:2], _NEVER, device=paths.ids.device)
        there = torch.zeros_like(scores, dtype=torch.bool)
        return _Done(paths, scores, there, ~there[:, :1])

    def with_ended(
        self,
        grown: _Paths,
        values: Tensor,
        ends: Tensor,
        options: GenerationOptions,
        generated: int,
    ) -> _Done:
        """With the candidates (B, C) that end, if they are among the best K and good enough."""
        beams = options.num_beams
        new = ends & (torch.arange(ends.shape[1], device=ends.device) < beams)
        scores = values / _length_factor(generated, options)
        if options.early_stopping is True:
            scores = scores + self.there_BK.all(1, keepdim=True) * _NEVER
        scores = scores + ~self.open_B1 * _NEVER + ~new * _NEVER
        scores, there = torch.cat([self.scores_BK, scores], 1), torch.cat([self.there_BK, new], 1)
        best = scores.topk(beams, dim=1).indices
        paths = self.paths.beside(grown).taken(best)
        return _Done(paths, scores.gather(1, best), there.gather(1, best), self.open_B1)

    def closed(self, best_B1: Tensor) -> _Done:
        """Where not even the best that a running beam may reach (B, 1) would enter."""
        worst = torch.where(self.there_BK, self.scores_BK.amin(1, keepdim=True), _NEVER)
        may_enter = (best_B1 > worst).any(1, keepdim=True)
        return _Done(self.paths, self.scores_BK, self.there_BK, self.open_B1 & may_enter)

    def may_improve(self, options: GenerationOptions) -> Tensor:
        """Whether the search has a reason to go on, as a tensor."""
        if options.early_stopping is True:
            return self.open_B1.any() & ~self.there_BK.all()
        return self.open_B1.any()

    def best(self, count: int, prompt: int, recorded: list[Tensor] | None) -> Generated:
        """The first `count` of each source."""
        ids, rows = (x[:, :count].flatten(0, 1) for x in (self.paths.ids, self.paths.rows))
        length = prompt + int((rows >= 0).sum(1).amax())
        return Generated(
            ids[:, :length],
            scores=tuple(recorded or ()),
            sequences_scores=self.scores_BK[:, :count].flatten(),
            beam_indices=rows[:, prompt:length],
        )


def _along(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))
