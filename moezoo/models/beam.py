"""Beam search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moezoo.config import SwitchConfig
from moezoo.models.sampling import GenerationOptions, adjusted


class Steps(Protocol):
    """What beam search needs of a model."""

    def start(self) -> Tensor: ...

    def scores(self, ids: Tensor) -> Tensor: ...

    def reorder(self, rows: Tensor) -> None: ...


@dataclass
class _Finished:
    """Complete sequences of one source: the best `size` by length-normalised score."""

    size: int
    length_penalty: float
    entries: list[tuple[float, Tensor]]

    def add(self, total: float, ids: Tensor, generated: int) -> None:
        score = total / generated**self.length_penalty
        self.entries.append((score, ids))
        self.entries.sort(key=lambda entry: -entry[0])
        del self.entries[self.size :]

    def is_final(self, best_running: float, generated: int, options: GenerationOptions) -> bool:
        """Whether no running beam can still enter, as far as `early_stopping` lets us tell."""
        if len(self.entries) < self.size:
            return False
        if options.early_stopping is True:
            return True
        if options.early_stopping == "never" and self.length_penalty > 0:
            generated = options.max_new_tokens  # the length at which a running beam scores best
        best_possible: float = best_running / generated**self.length_penalty
        return self.entries[-1][0] >= best_possible


def beam_search(stepper: Steps, options: GenerationOptions, config: SwitchConfig) -> Tensor:
    """The num_return_sequences best of num_beams sequences per source, (B * n, L), padded after
    eos.

    Beams of a source lie side by side. 2 * num_beams candidates are drawn per step, so that
    num_beams go on even if as many end; a candidate that ends outside of the best num_beams is
    lost.
    """
    beams, eos, pad = options.num_beams, config.eos_token_id, config.pad_token_id
    ids = stepper.start()
    sources = ids.shape[0] // beams
    if sources == 0:
        return ids
    # All beams start equal: only the first may speak, or all would say the same.
    total = torch.full((sources, beams), -1e9, device=ids.device)
    total[:, 0] = 0.0
    finished = [_Finished(beams, options.length_penalty, []) for _ in range(sources)]
    final = [False] * sources
    for step in range(1, options.max_new_tokens + 1):
        log_probs = stepper.scores(ids).log_softmax(-1)
        log_probs = adjusted(log_probs, ids, options, eos)
        vocabulary = log_probs.shape[-1]
        joint = (total.view(-1, 1) + log_probs).view(sources, beams * vocabulary)
        values, flat = joint.topk(min(2 * beams, joint.shape[1]), dim=1)
        token, row = flat % vocabulary, flat // vocabulary
        offset = torch.arange(sources, device=ids.device)[:, None] * beams
        ends = (token == eos) if step < options.max_new_tokens else torch.ones_like(token).bool()
        _collect(finished, final, ids, (values, token, row + offset, ends), beams)
        # The best num_beams candidates that go on.
        running = values.masked_fill(token == eos, -torch.inf)
        total, kept = running.topk(beams, dim=1)
        rows = (row + offset).gather(1, kept).view(-1)
        ids = torch.cat([ids[rows], token.gather(1, kept).view(-1, 1)], dim=1)
        stepper.reorder(rows)
        for source, entry in enumerate(finished):
            best = float(total[source, 0])
            final[source] |= entry.is_final(best, step, options)
        if all(final):
            break
    best_ids = [e[1] for entry in finished for e in entry.entries[: options.num_return_sequences]]
    return torch.nn.utils.rnn.pad_sequence(best_ids, batch_first=True, padding_value=pad)


def _collect(
    finished: list[_Finished],
    final: list[bool],
    ids: Tensor,
    candidates: tuple[Tensor, Tensor, Tensor, Tensor],
    beams: int,
) -> None:
    """Put the candidates that end, among the best `beams` of a source, aside.

    Candidates: log probability, token, row of ids and whether it ends, each (sources, 2 * beams).
    """
    step = ids.shape[1]  # the start token does not count, the new one does
    lists = [candidate[:, :beams].tolist() for candidate in candidates]
    for source, entry in enumerate(finished):
        if final[source]:
            continue
        for value, token, row, ends in zip(*(rows[source] for rows in lists), strict=True):
            if ends:
                entry.add(value, torch.cat([ids[row], ids.new_tensor([token])]), step)
