"""Generated tokens equal transformers' on many random models that end sentences often."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

import moezoo  # noqa: E402
from tests.parity.hf_weights import copy_weights, randomize  # noqa: E402

SIZES = {"vocab_size": 11, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 2, "num_layers": 2}


def drawn_options(draw: random.Random) -> dict[str, Any]:
    beams = draw.choice([1, 2, 3, 5])
    options: dict[str, Any] = {"num_beams": beams, "max_new_tokens": draw.choice([1, 4, 9])}
    if beams > 1:
        options["num_return_sequences"] = draw.randint(1, beams)
        options["length_penalty"] = draw.choice([0.0, 0.6, 1.0, 2.0, -1.0])
        options["early_stopping"] = draw.choice([True, False, "never"])
    options["min_new_tokens"] = draw.choice([0, 0, 1, 3]) % options["max_new_tokens"]
    options["no_repeat_ngram_size"] = draw.choice([0, 0, 1, 2, 3])
    options["repetition_penalty"] = draw.choice([1.0, 1.0, 1.3, 0.7])
    return options


@pytest.mark.parametrize("seed", range(24))
def test_generated_tokens_equal_transformers_for_any_options(seed: int) -> None:
    draw = random.Random(seed)
    config = transformers.T5Config(**SIZES, dropout_rate=0.0, decoder_start_token_id=0)
    reference = transformers.T5ForConditionalGeneration(config).eval()
    randomize(reference, seed)
    model = moezoo.build(moezoo.SwitchConfig(**SIZES))
    copy_weights(reference, model)
    with torch.no_grad():
        for shared in (reference.shared.weight, model.shared.weight):
            shared.mul_(4.0)  # logits far enough apart for float32 to agree on the order
    ids = torch.randint(2, 11, (3, 6), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    options = drawn_options(draw)
    theirs = reference.generate(input_ids=ids, attention_mask=mask, do_sample=False, **options)
    ours = model.generate(ids, mask, **options)
    # transformers fills up finished beams with eos when the padding id is 0; ours is padding.
    ended = (theirs == 1).cumsum(1) - (theirs == 1).int() > 0
    assert torch.equal(ours, theirs.masked_fill(ended, 0)), options
