"""How to generate: every option once, for `generate`, the command line and its page. No torch."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Callable, ItemsView, Mapping
from dataclasses import dataclass, field
from typing import Any

from moezoo.config import SwitchConfig
from moezoo.errors import ConfigError, did_you_mean

DEFAULT_NEW_TOKENS = 20


@dataclass(frozen=True)
class Kind:
    """What the value of an option may be, in words and as a question."""

    words: str
    holds: Callable[[Any], bool]


def _is_whole(value: Any, low: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _is_number(value: Any) -> bool:
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return plain and math.isfinite(value)


def _are_ids(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and all(map(_is_whole, value))


def _whole(low: int) -> Kind:
    return Kind(f"a whole number >= {low}", lambda value: _is_whole(value, low))


def _within(low: float, high: float) -> Kind:
    words = f"a number from {low:g} to {high:g}"
    return Kind(words, lambda value: _is_number(value) and low <= value <= high)


def _is_bias(value: Any) -> bool:
    pair = isinstance(value, tuple) and len(value) == 2
    return pair and _are_ids(value[0]) and isinstance(value[1], (int, float))


_FLAG = Kind("true or false", lambda value: isinstance(value, bool))
_EARLY = Kind('true, false or "never"', lambda value: isinstance(value, bool) or value == "never")
_FINITE = Kind("a finite number", _is_number)
_ABOVE_0 = Kind("a finite number > 0", lambda value: _is_number(value) and value > 0)
_FROM_0 = Kind("a finite number >= 0", lambda value: _is_number(value) and value >= 0)
_SHARE = Kind("a number in (0, 1]", lambda value: _is_number(value) and 0 < value <= 1)
_ID = _whole(0)
_IDS = Kind("an id or a list of ids", lambda value: _is_whole(value) or _are_ids(value))
_LIST = Kind("a list of ids", _are_ids)
_WORDS = Kind(
    "a list of lists of ids",
    lambda value: isinstance(value, tuple) and bool(value) and all(map(_are_ids, value)),
)
_BIASES = Kind(
    "a list of [list of ids, number]",
    lambda value: isinstance(value, tuple) and bool(value) and all(map(_is_bias, value)),
)
_DECAY = Kind(
    "[a whole number, a number > 0]",
    lambda value: (
        isinstance(value, tuple)
        and len(value) == 2
        and _is_whole(value[0])
        and _ABOVE_0.holds(value[1])
    ),
)


def _option(default: Any, kind: Kind, text: str) -> Any:
    return field(default=default, metadata={"kind": kind, "text": text})


@dataclass(frozen=True)
class GenerationOptions:
    """How to generate; names, meanings and defaults are those of transformers' GenerationConfig.

    Lists may be given for tuples. Raises ConfigError naming the option.
    """

    max_new_tokens: int | None = _option(
        None, _whole(1), "the most tokens to generate (20, unless max_length is given)"
    )
    max_length: int | None = _option(
        None, _whole(1), "the same with the decoder's prompt counted; max_new_tokens goes before it"
    )
    min_new_tokens: int | None = _option(
        None, _whole(0), "no end of sequence before so many tokens"
    )
    min_length: int = _option(
        0, _whole(0), "the same with the decoder's prompt counted; min_new_tokens goes before it"
    )
    max_time: float | None = _option(None, _FROM_0, "seconds after which no token is begun")
    num_beams: int = _option(1, _whole(1), "1: token by token; more: beam search")
    num_return_sequences: int = _option(
        1, _whole(1), "sequences per source: the best beams, or so many samples"
    )
    length_penalty: float = _option(
        1.0, _FINITE, "beams are ranked by log probability / generated tokens ** length_penalty"
    )
    early_stopping: bool | str = _option(
        False,
        _EARLY,
        "beam search ends when num_beams sequences are complete (true), no beam is likely to "
        'be better (false), or none can be ("never")',
    )
    do_sample: bool = _option(False, _FLAG, "draw tokens instead of taking the likeliest")
    temperature: float = _option(1.0, _FROM_0, "when drawing: scores are divided by it")
    top_k: int = _option(50, _whole(0), "when drawing: among so many likeliest tokens; 0: all")
    top_p: float = _option(
        1.0, _within(0, 1), "when drawing: among the likeliest tokens that make up this probability"
    )
    min_p: float | None = _option(
        None, _within(0, 1), "when drawing: among tokens at least min_p times as likely as the best"
    )
    top_h: float | None = _option(
        None, _SHARE, "when drawing: among the likeliest tokens with this share of the entropy"
    )
    typical_p: float = _option(
        1.0, _SHARE, "when drawing: among the most typical tokens that make up this probability"
    )
    epsilon_cutoff: float = _option(
        0.0, _within(0, 1), "when drawing: among tokens of at least this probability; 0: all"
    )
    eta_cutoff: float = _option(
        0.0, _within(0, 1), "when drawing: the same, lower where the entropy is high; 0: all"
    )
    repetition_penalty: float = _option(
        1.0, _ABOVE_0, "> 1 makes tokens that are there already less likely"
    )
    encoder_repetition_penalty: float = _option(
        1.0, _ABOVE_0, "> 1 makes tokens of the source more likely"
    )
    no_repeat_ngram_size: int = _option(0, _whole(0), "no n-gram of this size twice; 0: any")
    encoder_no_repeat_ngram_size: int = _option(
        0, _whole(0), "no n-gram of this size that the source has; 0: any"
    )
    bad_words_ids: tuple[tuple[int, ...], ...] | None = _option(
        None, _WORDS, "sequences of tokens that are never generated"
    )
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] | None = _option(
        None, _BIASES, "what is added to the score of a token that completes a sequence"
    )
    suppress_tokens: tuple[int, ...] | None = _option(None, _LIST, "tokens never generated")
    begin_suppress_tokens: tuple[int, ...] | None = _option(
        None, _LIST, "tokens that are not the first one generated"
    )
    forced_bos_token_id: int | None = _option(None, _ID, "the first token after the start token")
    forced_eos_token_id: int | tuple[int, ...] | None = _option(
        None, _IDS, "the token at the greatest length"
    )
    exponential_decay_length_penalty: tuple[int, float] | None = _option(
        None, _DECAY, "[n, factor]: from n new tokens on, the end grows likelier by factor ** i"
    )
    renormalize_logits: bool = _option(False, _FLAG, "make log probabilities of the final scores")
    remove_invalid_values: bool = _option(
        False, _FLAG, "NaN becomes 0, infinity the largest number"
    )
    eos_token_id: int | tuple[int, ...] | None = _option(
        None, _IDS, "what ends a sequence (the config's)"
    )
    pad_token_id: int | None = _option(None, _ID, "what follows the end (the config's)")
    decoder_start_token_id: int | None = _option(
        None, _ID, "what the decoder begins with (the config's)"
    )
    use_cache: bool = _option(True, _FLAG, "keep keys and values instead of computing them again")

    def __post_init__(self) -> None:
        for name in OPTIONS:
            object.__setattr__(self, name, checked(name, getattr(self, name)))
        self._check_together()

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a sequence."""
        return _tuple(self.eos_token_id)

    def lengths(self, prompt: int) -> tuple[int, int]:
        """The least and the greatest length of a sequence that begins with `prompt` tokens.

        Raises ConfigError where that leaves no token to generate.
        """
        longest = self.max_length
        if self.max_new_tokens is not None or longest is None:
            longest = prompt + (self.max_new_tokens or DEFAULT_NEW_TOKENS)
        if longest <= prompt:
            reason = f"the decoder's prompt has {prompt} tokens already"
            hint = "Raise it, or pass max_new_tokens."
            raise ConfigError(reason, field="max_length", found=longest, hint=hint)
        least = self.min_length if self.min_new_tokens is None else prompt + self.min_new_tokens
        return least, longest

    def _check_together(self) -> None:
        if self.do_sample and not self.temperature:
            hint = "Pass do_sample=False for the likeliest token."
            raise ConfigError("drawing needs a temperature > 0", field="temperature", hint=hint)
        most = math.inf if self.do_sample and self.num_beams == 1 else self.num_beams
        if self.num_return_sequences > most:
            hint = "Raise num_beams" + (", or pass do_sample=True." if most == 1 else ".")
            found = self.num_return_sequences
            reason = "num_return_sequences is larger than num_beams"
            raise ConfigError(reason, field="num_return_sequences", found=found, hint=hint)
        for name in ("forced_bos_token_id", "forced_eos_token_id"):
            forced = set(_tuple(getattr(self, name)))
            if forced and forced <= set(self.suppress_tokens or ()):
                reason = f"{name} is suppressed by suppress_tokens"
                raise ConfigError(reason, field=name, found=sorted(forced))


OPTIONS = {option.name: option for option in dataclasses.fields(GenerationOptions)}
_TOKENS = ("decoder_start_token_id", "eos_token_id", "pad_token_id")
# Fields of transformers' GenerationConfig: when one would change the tokens, and what to do.
_Question = Callable[[Any, GenerationOptions], bool]
UNFOLLOWED: dict[str, tuple[_Question, str]] = {
    **dict.fromkeys(
        ("constraints", "force_words_ids", "watermarking_config"),
        (lambda value, options: True, "Pass a logits_processor of your own."),
    ),
    "stop_strings": (lambda value, options: True, "Pass stopping_criteria of your own."),
    **dict.fromkeys(
        ("prompt_lookup_num_tokens", "assistant_early_exit", "dola_layers"),
        (lambda value, options: options.num_beams == 1, ""),
    ),
    **dict.fromkeys(
        ("use_mtp", "is_assistant", "token_healing"), (lambda value, options: bool(value), "")
    ),
    "guidance_scale": (lambda value, options: value != 1, "Pass a logits_processor of your own."),
    "num_beam_groups": (lambda value, options: options.num_beams > 1 and value != 1, ""),
    "penalty_alpha": (
        lambda value, options: (
            bool(value) and not options.do_sample and options.num_beams == 1 and options.top_k > 1
        ),
        "",
    ),
    "cache_implementation": (lambda value, options: value == "quantized", ""),
}


def checked(name: str, value: Any) -> Any:
    """The value of an option, lists as tuples. Raises ConfigError naming the option."""
    option, frozen = OPTIONS[name], _frozen(value)
    kind: Kind = option.metadata["kind"]
    empty = frozen == () and name == "eos_token_id"  # nothing ends a sequence
    unsaid = frozen is None and option.default is None
    if not (unsaid or empty or kind.holds(frozen)):
        found = repr(value)[:80]
        raise ConfigError(f"bad {name}", field=name, expected=kind.words, found=found)
    return frozen


def options_for(
    stored: Mapping[str, Any], said: Mapping[str, Any], config: SwitchConfig
) -> GenerationOptions:
    """What is said goes before what is stored with a model, and that before config and defaults.

    Args:
        stored: fields of generation_config.json; those that change nothing here may be any.
        said: options by name; None takes back what is stored.

    Warns, as transformers, of a length that is said and not followed, because the other one of its
    kind goes before it. Raises ConfigError naming an option that is unknown, bad, or cannot be
    followed.
    """
    unknown = next((name for name in said if name not in OPTIONS | UNFOLLOWED), None)
    if unknown is not None:
        hint = did_you_mean(unknown, OPTIONS)
        raise ConfigError(f"unknown option {unknown!r} of generate", field=unknown, hint=hint)
    values = dict(stored)
    for new, total in (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length")):
        if said.get(total) is not None and {**values, **said}.get(new) is not None:
            goes = f"{new} = {str({**values, **said}[new])[:20]} goes before {total}"
            warnings.warn(f"{goes}; pass {new}, or {new}=None (--without {new})", stacklevel=4)
    values = {name: value for name, value in {**values, **said}.items() if value is not None}
    tokens = {name: getattr(config, name) for name in _TOKENS}
    known = {name: value for name, value in values.items() if name in OPTIONS}
    try:
        options = GenerationOptions(**{**tokens, **known})
        _refuse_unfollowed(values, options)
    except ConfigError as error:
        if error.field in stored and error.field not in said:
            leave = f"pass {error.field}=None (--without {error.field}) to leave it out"
            way = f"generation_config.json says so: {leave}"
            error.hint = f"{way}. {error.hint}" if error.hint else f"{way}."
            error.args = (str(error),)
        raise
    _check_lengths(options, said)
    return options


def _refuse_unfollowed(values: Mapping[str, Any], options: GenerationOptions) -> None:
    for name, (changes, way) in UNFOLLOWED.items():
        if name in values and changes(values[name], options):
            found, reason = repr(values[name])[:80], f"moezoo's generate has no {name}"
            raise ConfigError(reason, field=name, found=found, hint=way or None)


def _check_lengths(options: GenerationOptions, said: Mapping[str, Any]) -> None:
    """Refuse a least length that is asked for and cannot be; a stored one is cut, as in
    transformers.
    """
    most = options.max_new_tokens or (DEFAULT_NEW_TOKENS if options.max_length is None else None)
    pairs = (("min_new_tokens", "max_new_tokens", most), ("min_length", "max_length", None))
    for least, limit, bound in pairs:
        bound = getattr(options, limit) if bound is None else bound
        if bound is not None and (said.get(least) or 0) > bound:
            reason = f"{least} is larger than {limit} = {bound}"
            raise ConfigError(reason, field=least, found=said[least])


@dataclass(frozen=True)
class StoredGeneration:
    """What a checkpoint says about generation, whole: the text of its generation_config.json."""

    text: str = "{}"

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> StoredGeneration:
        return cls(json.dumps(dict(values), sort_keys=True))

    @property
    def values(self) -> dict[str, Any]:
        """The fields by name, with those that moezoo does not know."""
        values: dict[str, Any] = json.loads(self.text)
        return values

    def replace(self, **changes: Any) -> StoredGeneration:
        """With other fields; None takes one out."""
        values = {**self.values, **changes}
        return self.of({name: value for name, value in values.items() if value is not None})


def _tuple(value: int | tuple[int, ...] | None) -> tuple[int, ...]:
    return () if value is None else value if isinstance(value, tuple) else (value,)


def _frozen(value: Any) -> Any:
    value = value.items() if isinstance(value, dict) else value  # sequence_bias may be one
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple, ItemsView)) else value
