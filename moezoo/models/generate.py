"""Generation: greedy, sampling and beam search, batched, with a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, overload

import torch
from torch import Tensor

from moezoo.errors import ConfigError
from moezoo.generation_options import GenerationOptions, options_for
from moezoo.models.beam import beam_search
from moezoo.models.decoding import Decoding
from moezoo.models.inputs import check_batch, check_device, check_ids, real_tokens
from moezoo.models.logits_rules import Allowed, Prompt, Rule, rules_of
from moezoo.models.next_token import Criterion, NextToken
from moezoo.models.output import Generated
from moezoo.models.sampling import drawn, warpers_of
from moezoo.models.stepper import Stepper


class Streamer(Protocol):
    """What is told of tokens as they come: first the decoder's prompt (B, L), then (B,) a step."""

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


@overload
def generate(
    self: Decoding,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    return_scores: Literal[True],
    **options: Any,
) -> Generated: ...
@overload
def generate(
    self: Decoding,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    return_scores: Literal[False] = False,
    **options: Any,
) -> Tensor: ...
@torch.no_grad()
def generate(
    self: Decoding,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    inputs_embeds: Tensor | None = None,
    decoder_input_ids: Tensor | None = None,
    decoder_attention_mask: Tensor | None = None,
    logits_processor: Rule | Sequence[Rule] = (),
    stopping_criteria: Criterion | Sequence[Criterion] = (),
    prefix_allowed_tokens_fn: Allowed | None = None,
    streamer: Streamer | None = None,
    generator: torch.Generator | None = None,
    return_scores: bool = False,
    **options: Any,
) -> Tensor | Generated:
    """Generate target ids for a batch of sources, as transformers' `generate` does.

    Ranks that hold parts of one model must all call it, each with sources of its own or none.

    Args:
        input_ids: (B, Ls), or inputs_embeds (B, Ls, D). attention_mask: (B, Ls), 1 for real tokens.
        decoder_input_ids: (B, L) what every target begins with; the start token is put before it
            where no row has it. decoder_attention_mask: (B, L), for prompts padded on the left.
        logits_processor: functions (ids, scores) -> scores, applied after the options' rules.
        stopping_criteria: functions (ids, scores or None) -> (R,) booleans: which rows end.
        prefix_allowed_tokens_fn: (index of a source, ids (L,)) -> the tokens that may follow.
        streamer: is told the prompt and then each token by `put`, and the end by `end`.
        generator: what draws come from; None: torch's own.
        return_scores: return a `Generated` with scores.
        options: fields of `GenerationOptions`; what is not said is what the model's checkpoint
            says (`generation`, from its generation_config.json), or the default.

    Returns:
        (B * num_return_sequences, L) ids, beginning with the start token; after the end comes
        padding. With return_scores a `Generated`.

    Raises ConfigError naming an option that is unknown, bad or cannot be followed.
    """
    chosen = options_for(self.generation.values, options, self.config)
    if streamer is not None and chosen.num_beams > 1:
        reason = "beams change until the end: there is nothing to stream"
        raise ConfigError(reason, field="streamer", hint="Pass num_beams=1.")
    memory, real, _ = self._encode(input_ids, attention_mask, inputs_embeds)
    prompt = _prompt(self, memory, chosen, input_ids, decoder_input_ids, decoder_attention_mask)
    own = _functions(logits_processor, "logits_processor")
    vocabulary = self.config.vocab_size
    rules = rules_of(
        chosen, prompt, vocabulary=vocabulary, own=own, allowed=prefix_allowed_tokens_fn
    )
    _, longest = chosen.lengths(prompt.length)
    stepper = Stepper(
        self,
        memory,
        real,
        rows=prompt.ids.shape[0],
        prompt_real=prompt.real,
        use_cache=chosen.use_cache,
        tokens=longest - prompt.length,
    )
    if not prompt.ids.shape[0]:
        stepper.finish()
        return Generated(prompt.ids) if return_scores else prompt.ids
    next_token = NextToken(
        stepper,
        [*rules, *warpers_of(chosen)],
        chosen,
        longest=longest,
        criteria=_functions(stopping_criteria, "stopping_criteria"),
        generator=generator,
        copied=bool(own),
        recorded=return_scores,
    )
    if chosen.num_beams > 1:
        found = beam_search(next_token, prompt.ids, chosen)
    else:
        found = _one_by_one(next_token, prompt.ids, chosen, streamer)
    stepper.finish()
    return found if return_scores else found.sequences


def _one_by_one(
    next_token: NextToken, prompt: Tensor, options: GenerationOptions, streamer: Streamer | None
) -> Generated:
    ids = prompt.new_full((prompt.shape[0], next_token.longest), next_token.pad)
    ids[:, : prompt.shape[1]] = prompt
    if streamer is not None:
        streamer.put(prompt.cpu())
    done = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
    total = None if next_token.recorded is None else torch.zeros(ids.shape[0], device=ids.device)
    for length in range(prompt.shape[1], ids.shape[1]):
        scores = next_token.scores(ids[:, :length])
        if options.do_sample:
            token = drawn(scores, 1, next_token.generator).squeeze(1)
        else:
            token = scores.argmax(-1)
        if total is not None:
            total += scores.log_softmax(-1).gather(1, token[:, None])[:, 0].masked_fill(done, 0.0)
        token = torch.where(done, next_token.pad, token)
        ids[:, length] = token
        if streamer is not None:
            streamer.put(token.cpu())
        done = done | next_token.ended(ids[:, : length + 1])
        if bool(done.all()):
            ids = ids[:, : length + 1].clone()
            break
    if streamer is not None:
        streamer.end()
    return Generated(ids, tuple(next_token.recorded or ()), total)


def _prompt(
    model: Decoding,
    memory: Tensor,
    options: GenerationOptions,
    source: Tensor | None,
    ids: Tensor | None,
    mask: Tensor | None,
) -> Prompt:
    """What the decoder begins with, a row for each beam or sample of each source."""
    batch, start = memory.shape[0], options.decoder_start_token_id or 0
    first = torch.full((batch, 1), start, dtype=torch.int64, device=memory.device)
    real = None
    if ids is None:
        if mask is not None:
            reason = "a mask needs decoder_input_ids"
            raise ConfigError(reason, field="decoder_attention_mask")
        ids = first
    else:
        check_ids(ids, model.config.vocab_size, "decoder_input_ids")
        check_device(ids, memory, "decoder_input_ids")
        check_batch(ids, batch, "decoder_input_ids", "the source")
        real = real_tokens(mask, ids, "decoder_attention_mask")
        ids = ids.long()
        if not bool((ids[:, :1] == start).any()):
            ids = torch.cat([first, ids], 1)
            real = None if real is None else torch.cat([torch.ones_like(real[:, :1]), real], 1)
    copies = options.num_beams if options.num_beams > 1 else options.num_return_sequences
    real = None if real is None else real.repeat_interleave(copies, 0)
    return Prompt(ids.repeat_interleave(copies, 0), real, source)


def _functions(given: Callable[..., Any] | Sequence[Any], name: str) -> list[Any]:
    """One function or several; transformers' lists of them are both, and count as lists."""
    functions = list(given) if isinstance(given, (list, tuple)) else [given]
    bad = next((function for function in functions if not callable(function)), None)
    if bad is not None:
        raise ConfigError(f"{name} takes functions", field=name, found=type(bad).__name__)
    return functions
