"""Generation: greedy, sampling and beam search, batched, with a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moezoo.config import SwitchConfig
from moezoo.models.beam import beam_search
from moezoo.models.cache import DecoderCache
from moezoo.models.graph_step import GraphStep, may_be_a_graph
from moezoo.models.sampling import GenerationOptions, adjusted, sampled
from moezoo.models.step import DecoderStep, steps_apart

if TYPE_CHECKING:
    from moezoo.models.switch import SwitchForConditionalGeneration

_WORTH_A_GRAPH = 8  # tokens: recording one takes as long as a few of them


@torch.no_grad()
def generate(
    self: SwitchForConditionalGeneration,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    inputs_embeds: Tensor | None = None,
    max_new_tokens: int = 20,
    min_new_tokens: int = 0,
    num_beams: int = 1,
    num_return_sequences: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
    use_cache: bool = True,
) -> Tensor:
    """Generate target ids for a batch of sources.

    Args:
        input_ids: (B, Ls), or inputs_embeds (B, Ls, D). attention_mask: (B, Ls), 1 for real tokens.
        max_new_tokens, min_new_tokens: bounds on the generated length, the start token not counted.
        num_beams: 1 is greedy search (or sampling); more is beam search. length_penalty: beams are
            ranked by log probability / length^penalty. early_stopping: True stops as soon as
            num_beams sequences are complete, False when no running beam is likely to win, "never"
            when none can. num_return_sequences: best beams, or samples, per source.
        do_sample: draw tokens; temperature, top_k (0: all) and top_p (1.0: all) shape the draw.
        repetition_penalty, no_repeat_ngram_size: discourage or forbid repetition.
        use_cache: keep keys and values; without, every step recomputes the prefix.

    Returns:
        (B * num_return_sequences, <= 1 + max_new_tokens) ids, starting with the start token; after
        eos comes padding.

    Raises ConfigError naming a bad option.
    """
    options = GenerationOptions(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        num_beams=num_beams,
        num_return_sequences=num_return_sequences,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        do_sample=do_sample,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        no_repeat_ngram_size=no_repeat_ngram_size,
        use_cache=use_cache,
    )
    memory, real, _ = self._encode(input_ids, attention_mask, inputs_embeds)
    copies = options.num_beams if options.num_beams > 1 else options.num_return_sequences
    stepper = Stepper(
        self, memory, real, copies=copies, use_cache=use_cache, tokens=options.max_new_tokens
    )
    if options.num_beams > 1:
        return beam_search(stepper, options, self.config)
    return _one_by_one(stepper, options, self.config)


class Stepper:
    """Scores of the next token for a batch of prefixes, `copies` side by side per source; `tokens`
    are to be expected.
    """

    def __init__(
        self,
        model: SwitchForConditionalGeneration,
        memory: Tensor,
        real: Tensor | None,
        *,
        copies: int,
        use_cache: bool,
        tokens: int = 0,
    ) -> None:
        self.model, self.memory, self.real = model, memory, real
        self.rows = memory.shape[0] * copies
        self.cache = DecoderCache() if use_cache else None
        self.step: DecoderStep | GraphStep | None = None
        if use_cache and self.rows and steps_apart(model.decoder, memory):
            self.step = DecoderStep(model.decoder, memory, real, rows=self.rows)
        elif use_cache and self.rows and tokens >= _WORTH_A_GRAPH:
            self.step = self._graph()

    def start(self) -> Tensor:
        """The first decoder column (B * copies, 1)."""
        start = self.model.config.decoder_start_token_id
        return torch.full((self.rows, 1), start, dtype=torch.int64, device=self.memory.device)

    def scores(self, ids: Tensor) -> Tensor:
        """float32 logits (B * copies, V) of the token after ids (B * copies, L)."""
        model = self.model
        newest = ids[:, -1:]
        if isinstance(self.step, GraphStep):
            return self.step(newest)
        table = model.decoder.table(model.shared)
        if self.step is not None:
            return model.head(self.step(table(newest[:, 0]), newest)).float()
        new = ids if self.cache is None else ids[:, self.cache.length :]
        hidden, _ = model.decoder(
            table(new),
            token_ids=new,
            memory=self.memory,
            memory_mask=self.real,
            cache=self.cache,
        )
        return model.head(hidden[:, -1]).float()

    def _graph(self) -> GraphStep | None:
        model, memory = self.model, self.memory
        if not may_be_a_graph(model, memory):
            return None
        try:
            return GraphStep(model, memory, self.real, rows=self.rows)
        except torch.OutOfMemoryError:  # a graph keeps memory of its own
            return None

    def reorder(self, rows: Tensor) -> None:
        """Continue from the given rows of the batch."""
        if self.step is not None:
            self.step.reorder(rows)
        elif self.cache is not None:
            self.cache.reorder(rows)


def _one_by_one(stepper: Stepper, options: GenerationOptions, config: SwitchConfig) -> Tensor:
    eos, pad = config.eos_token_id, config.pad_token_id
    start = stepper.start()
    ids = start.new_full((start.shape[0], 1 + options.max_new_tokens), pad)
    ids[:, :1] = start
    if ids.shape[0] == 0:
        return start
    done = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
    for length in range(1, ids.shape[1]):
        prefix = ids[:, :length]
        scores = adjusted(stepper.scores(prefix), prefix, options, eos)
        token = sampled(scores, options) if options.do_sample else scores.argmax(-1)
        ids[:, length] = torch.where(done, pad, token)
        done = done | (token == eos)
        if bool(done.all()):
            return ids[:, : length + 1].clone()
    return ids
