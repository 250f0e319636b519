"""Rules that change the scores of the next token by the tokens so far, in transformers' order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from moezoo.errors import ConfigError, ShapeError
from moezoo.generation_options import GenerationOptions

# From ids (R, L) so far and scores (R, V) of the next token to scores (R, V).
Rule = Callable[[Tensor, Tensor], Tensor]
Allowed = Callable[[int, Tensor], Sequence[int]]
_IDS: tuple[str, ...] = (
    *("suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id"),
    *("bad_words_ids", "sequence_bias"),
    *("decoder_start_token_id", "eos_token_id", "pad_token_id"),
)


@dataclass(frozen=True)
class Prompt:
    """What rules know of a generation beside the tokens so far.

    ids: (R, L) what the decoder begins with. real: (R, L) its real tokens; None: all. source: (B,
    Ls) the source's ids, R a multiple of B; None where only embeddings are there.
    """

    ids: Tensor
    real: Tensor | None = None
    source: Tensor | None = None

    @property
    def length(self) -> int:
        return self.ids.shape[1]


def rules_of(
    options: GenerationOptions,
    prompt: Prompt,
    *,
    vocabulary: int,
    own: Sequence[Rule] = (),
    allowed: Allowed | None = None,
) -> list[Rule]:
    """The rules that options ask for, one after the other; the caller's own come last.

    Args:
        vocabulary: V; ids beyond it are refused.
        allowed: the tokens that may follow a prefix (L,) of a source, by the source's index.

    Raises ConfigError naming an option that is impossible here.
    """
    _check_ids(options, vocabulary)
    device, eos = prompt.ids.device, options.eos_token_ids

    def tensor(tokens: int | Sequence[int]) -> Tensor:
        return torch.tensor([tokens] if isinstance(tokens, int) else list(tokens), device=device)

    least, longest = options.lengths(prompt.length)
    rules: list[Rule] = []
    if options.sequence_bias:
        rules.append(_SequenceBias(options.sequence_bias, vocabulary, device))
    rules += _repetition(options, prompt)
    if options.bad_words_ids:
        words = [word for word in options.bad_words_ids if word not in {(i,) for i in eos}]
        biases = tuple((word, -torch.inf) for word in words)
        rules.append(_SequenceBias(biases, vocabulary, device))
    if least > prompt.length and eos:
        rules.append(partial(_forbidden, tokens=tensor(eos), before=least))
    if allowed is not None:
        rules.append(partial(_only_allowed, allowed=allowed, beams=options.num_beams))
    if options.forced_bos_token_id is not None:
        rules.append(partial(_forced, tokens=tensor(options.forced_bos_token_id), at=1))
    if options.forced_eos_token_id is not None:
        ends = tensor(options.forced_eos_token_id)
        rules.append(partial(_forced, tokens=ends, at=longest - 1))
    if options.remove_invalid_values:
        rules.append(_finite)
    if options.exponential_decay_length_penalty is not None and eos:
        first, factor = options.exponential_decay_length_penalty
        rules.append(
            partial(_decay, tokens=tensor(eos), start=first + prompt.length, factor=factor)
        )
    if options.suppress_tokens:
        rules.append(partial(_forbidden, tokens=tensor(options.suppress_tokens)))
    if options.begin_suppress_tokens:
        # A forced first token is not the one that is meant.
        later = prompt.length == 1 and options.forced_bos_token_id is not None
        tokens = tensor(options.begin_suppress_tokens)
        rules.append(partial(_forbidden, tokens=tokens, at=prompt.length + later))
    return rules + [partial(_checked, rule=rule) for rule in own]


def applied(rules: Iterable[Rule], ids: Tensor, scores: Tensor) -> Tensor:
    """Scores (R, V) after all rules; ids: (R, L)."""
    for rule in rules:
        scores = rule(ids, scores)
    return scores


def _repetition(options: GenerationOptions, prompt: Prompt) -> list[Rule]:
    """Rules about tokens that the source or the target has already."""
    rules: list[Rule] = []
    size = options.encoder_no_repeat_ngram_size
    if options.encoder_repetition_penalty != 1.0:
        source = _source(prompt, "encoder_repetition_penalty")
        seen = source.repeat_interleave(prompt.ids.shape[0] // max(source.shape[0], 1), 0)
        penalty = 1.0 / options.encoder_repetition_penalty
        rules.append(lambda ids, scores: _penalised(seen, scores, penalty))
    if options.repetition_penalty != 1.0:
        rules.append(partial(_repeated, penalty=options.repetition_penalty, real=prompt.real))
    if options.no_repeat_ngram_size:
        rules.append(partial(_no_repeats, size=options.no_repeat_ngram_size))
    if size:
        source = _source(prompt, "encoder_no_repeat_ngram_size")
        grams = source.unfold(1, size, 1) if source.shape[1] >= size else source[:, :0, None]
        grams = grams.repeat_interleave(prompt.ids.shape[0] // max(source.shape[0], 1), 0)
        rules.append(lambda ids, scores: _without(grams, ids, scores, size))
    return rules


def _source(prompt: Prompt, name: str) -> Tensor:
    if prompt.source is None:
        hint = "Pass input_ids instead of inputs_embeds, or leave the option out."
        raise ConfigError(f"{name} looks at the source's ids", field=name, hint=hint)
    return prompt.source.long()


def _check_ids(options: GenerationOptions, vocabulary: int) -> None:
    """Refuse ids that the model does not have."""
    for name in _IDS:
        value = getattr(options, name)
        if name == "sequence_bias" and value:
            value = tuple(word for word, _ in value)
        largest = max(_flat(value), default=0)
        if largest >= vocabulary:
            wanted = f"ids below {vocabulary}"
            reason = f"{name} names a token that the model does not have"
            raise ConfigError(reason, field=name, expected=wanted, found=largest)


def _flat(value: object) -> list[int]:
    if isinstance(value, tuple):
        return [token for part in value for token in _flat(part)]
    return [value] if isinstance(value, int) else []


class _SequenceBias:
    """Add a number to the score of a token that completes a sequence."""

    def __init__(
        self,
        biases: Sequence[tuple[tuple[int, ...], float]],
        vocabulary: int,
        device: torch.device,
    ) -> None:
        self.always = torch.zeros(vocabulary, device=device)
        groups: dict[int, list[tuple[tuple[int, ...], float]]] = {}
        for word, bias in dict(biases).items():
            groups.setdefault(len(word) - 1, []).append((word, bias))
        for (token,), bias in groups.pop(0, []):
            self.always[token] = bias
        # By length of the beginning: beginnings (n, length), last tokens (n,), biases (n,).
        self.groups = [
            (
                torch.tensor([word[:-1] for word, _ in group], device=device),
                torch.tensor([word[-1] for word, _ in group], device=device),
                torch.tensor([float(bias) for _, bias in group], device=device),
            )
            for group in groups.values()
        ]

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        total = self.always.expand_as(scores).clone()
        for beginnings, last, biases in self.groups:
            length = beginnings.shape[1]
            if length <= ids.shape[1]:
                begun = (ids[:, None, -length:] == beginnings).all(-1)
                total.index_add_(1, last, torch.where(begun, biases, 0.0))
        return scores + total


def _penalised(seen: Tensor, scores: Tensor, penalty: float) -> Tensor:
    """Scores with those of seen tokens (R, L) made worse by a factor."""
    found = scores.gather(1, seen)
    return scores.scatter(1, seen, torch.where(found < 0, found * penalty, found / penalty))


def _repeated(ids: Tensor, scores: Tensor, *, penalty: float, real: Tensor | None) -> Tensor:
    """Tokens before the first real one of a row do not count; they act as that one."""
    if real is not None:
        first = real.int().argmax(1, keepdim=True)
        place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        ids = ids.gather(1, torch.maximum(place, first))
    return _penalised(ids, scores, penalty)


def _no_repeats(ids: Tensor, scores: Tensor, *, size: int) -> Tensor:
    if ids.shape[1] < size:
        return scores
    return _without(ids.unfold(1, size, 1), ids, scores, size)


def _without(grams: Tensor, ids: Tensor, scores: Tensor, size: int) -> Tensor:
    """Scores without tokens that would complete one of the n-grams (R, n, size)."""
    if ids.shape[1] < size - 1 or not grams.shape[1]:
        return scores
    end = ids[:, None, ids.shape[1] - size + 1 :]
    begun = (grams[:, :, :-1] == end).all(-1)
    count = torch.zeros_like(scores, dtype=torch.int32)
    banned = count.scatter_add(1, grams[:, :, -1], begun.to(torch.int32)) > 0
    return scores.masked_fill(banned, -torch.inf)


def _forbidden(
    ids: Tensor,
    scores: Tensor,
    *,
    tokens: Tensor,
    before: int | None = None,
    at: int | None = None,
) -> Tensor:
    """Scores without tokens: always, below a length, or at one."""
    length = ids.shape[1]
    if (before is not None and length >= before) or (at is not None and length != at):
        return scores
    return scores.index_fill(1, tokens, -torch.inf)


def _forced(ids: Tensor, scores: Tensor, *, tokens: Tensor, at: int) -> Tensor:
    """Nothing but the tokens, at one length."""
    if ids.shape[1] != at:
        return scores
    return torch.full_like(scores, -torch.inf).index_fill_(1, tokens, 0.0)


def _finite(ids: Tensor, scores: Tensor) -> Tensor:
    return scores.nan_to_num(nan=0.0)


def _decay(ids: Tensor, scores: Tensor, *, tokens: Tensor, start: int, factor: float) -> Tensor:
    """The end's scores raised by their size times factor^i - 1, i tokens after the start."""
    beyond = ids.shape[1] - start
    if beyond <= 0:
        return scores
    ends = scores.index_select(1, tokens)
    raised = ends + (ends.abs() * (factor**beyond - 1)).masked_fill(~ends.isfinite(), 0.0)
    return scores.index_copy(1, tokens, raised)


def _only_allowed(ids: Tensor, scores: Tensor, *, allowed: Allowed, beams: int) -> Tensor:
    """Only what a function of source and prefix allows; where rules leave none of it to any beam
    of a source, all of it with score 0.
    """
    mask = torch.full_like(scores, -torch.inf)
    for row, prefix in enumerate(ids):
        tokens = list(allowed(row // beams, prefix))
        if not tokens:
            reason = f"prefix_allowed_tokens_fn allows no token for source {row // beams}"
            raise ConfigError(reason, field="prefix_allowed_tokens_fn")
        mask[row, tokens] = 0.0
    found = scores + mask
    nothing = found.amax(-1).isneginf().view(-1, beams).all(-1).repeat_interleave(beams)
    return torch.where(nothing[:, None], mask, found)


def _checked(ids: Tensor, scores: Tensor, *, rule: Rule) -> Tensor:
    """A rule of the caller's. Raises ShapeError where it returns something else than scores."""
    found = rule(ids, scores)
    shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if shape != tuple(scores.shape):
        wanted = tuple(scores.shape)
        reason = "a logits_processor returned no scores"
        raise ShapeError(reason, field="logits_processor", expected=wanted, found=shape)
    return found
