"""Generation against what it abbreviates: recomputing every prefix, and trying every sequence."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import moezoo

V, EOS, PAD = 5, 1, 0


@cache
def model(seed: int) -> Any:
    sizes = {"vocab_size": V, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_heads": 2, "num_layers": 1}
    made = moezoo.build(
        moezoo.SwitchConfig(**sizes, num_experts=2, decoder_sparse_layers="all", dropout_rate=0.0)
    )
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.copy_(0.6 * torch.randn(parameter.shape, generator=random))
    return made


def ids(rows: int, length: int, seed: int) -> Tensor:
    return torch.randint(2, V, (rows, length), generator=torch.Generator().manual_seed(seed))


SEEDS = st.integers(0, 20)


@given(seed=SEEDS, beams=st.integers(1, 3), prompt=st.integers(0, 3), size=st.integers(0, 2))
def test_a_cache_changes_no_generated_token(seed: int, beams: int, prompt: int, size: int) -> None:
    asked: dict[str, Any] = {"num_beams": beams, "no_repeat_ngram_size": size}
    asked |= {"max_new_tokens": 5, "min_new_tokens": 3}
    if prompt:
        asked["decoder_input_ids"] = ids(2, prompt, seed + 1)
    source = ids(2, 4, seed)
    found, expected = (
        model(seed).generate(source, **asked, use_cache=use, return_scores=True)
        for use in (True, False)
    )
    assert torch.equal(found.sequences, expected.sequences)
    assert not (found.sequences[:, prompt + 1 : prompt + 4] == EOS).any()
    for ours, theirs in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@given(seed=SEEDS, prompt=st.integers(0, 2), penalty=st.sampled_from([-1.0, 0.0, 0.7, 1.0, 2.0]))
def test_beams_enough_for_all_find_the_best_of_all_sequences(
    seed: int, prompt: int, penalty: float
) -> None:
    source, start = ids(1, 4, seed), ids(1, prompt, seed + 1)
    found = model(seed).generate(
        source,
        decoder_input_ids=start if prompt else None,
        num_beams=V**2,
        max_new_tokens=3,
        length_penalty=penalty,
        early_stopping="never",
        return_scores=True,
    )
    best = max(scores(model(seed), source, start, penalty).values())
    torch.testing.assert_close(float(found.sequences_scores[0]), best, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def scores(
    made: Any, source: Tensor, start: Tensor, penalty: float
) -> dict[tuple[int, ...], float]:
    """Of every sequence of up to three tokens, by teacher forcing."""
    all_of_them = torch.tensor(list(product(range(V), repeat=3)))
    rows = all_of_them.shape[0]
    first = torch.full((rows, 1), PAD)
    prompt = torch.cat([first, start.expand(rows, -1)], 1)
    targets = torch.cat([prompt, all_of_them], 1)
    logits = made(source.expand(rows, -1), decoder_input_ids=targets[:, :-1]).logits
    log_probs = logits[:, prompt.shape[1] - 1 :].log_softmax(-1)
    tokens = log_probs.gather(2, all_of_them[:, :, None])[:, :, 0].tolist()
    found: dict[tuple[int, ...], float] = {}
    for row, parts in zip(all_of_them.tolist(), tokens, strict=True):
        length = row.index(EOS) + 1 if EOS in row else len(row)
        found[tuple(row[:length])] = sum(parts[:length]) / length**penalty
    return found
