"""Scores of the next token after all rules, and whether a sequence ends: what searches share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moezoo.generation_options import GenerationOptions
from moezoo.models.logits_rules import Rule, applied
from moezoo.models.stepper import Stepper

# From ids (R, L) and the scores so far to (R,) booleans, or one for all.
Criterion = Callable[[Tensor, "tuple[Tensor, ...] | None"], "Tensor | bool"]


class NextToken:
    """Scores by a stepper and rules; ends by options and criteria.

    Args:
        longest: the greatest length, the decoder's prompt counted.
        copied: hand rules scores of their own, which nothing overwrites.
        recorded: keep the scores of every step.
    """

    def __init__(
        self,
        stepper: Stepper,
        rules: Sequence[Rule],
        options: GenerationOptions,
        *,
        longest: int,
        criteria: Sequence[Criterion] = (),
        generator: torch.Generator | None = None,
        copied: bool = False,
        recorded: bool = False,
    ) -> None:
        self.stepper, self.rules, self.criteria = stepper, rules, criteria
        self.longest, self.generator = longest, generator
        self.copied = copied or recorded
        self.recorded: list[Tensor] | None = [] if recorded else None
        self.pad = options.pad_token_id or 0
        self.eos = torch.tensor(options.eos_token_ids, device=stepper.memory.device)
        self.until = None if options.max_time is None else time.monotonic() + options.max_time

    def scores(self, ids: Tensor, *, log_probs: bool = False) -> Tensor:
        """float32 scores (R, V) of the token after ids (R, L): logits or log probabilities, after
        all rules.
        """
        scores = self.stepper.scores(ids)
        if log_probs:
            scores = scores.log_softmax(-1)
        elif self.copied:
            scores = scores.clone()
        scores = applied(self.rules, ids, scores)
        if self.recorded is not None:
            self.recorded.append(scores)
        return scores

    def reorder(self, rows: Tensor) -> None:
        """Continue from the given rows."""
        self.stepper.reorder(rows)

    def ended(self, ids: Tensor) -> Tensor:
        """Which rows (R,) end with the last token of ids (R, L)."""
        if ids.shape[1] >= self.longest or (self.until and time.monotonic() > self.until):
            return torch.ones_like(ids[:, 0], dtype=torch.bool)
        newest = ids[:, -1]
        ends = (newest[:, None] == self.eos).any(1) if len(self.eos) != 1 else newest == self.eos
        for criterion in self.criteria:
            scores = None if self.recorded is None else tuple(self.recorded)
            found = torch.as_tensor(criterion(ids, scores), dtype=torch.bool, device=ids.device)
            ends = ends | found
        return ends
