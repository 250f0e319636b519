"""Compiled blocks and gradient checkpointing train as plain ones do."""

from __future__ import annotations

import copy

import pytest

from moezoo.training.loop import fit, start
from moezoo.training.recipes import TrainingRecipe
from moezoo.training.session import compile_blocks
from tests.training.test_loop import batches
from tests.training.text import small_model

SETTINGS = TrainingRecipe(clip=0.0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("how", ["compile", "checkpointing"])
def test_two_steps_end_with_the_weights_of_plain_ones(how: str) -> None:
    plain = small_model(dropout_rate=0.0)
    other = copy.deepcopy(plain)
    if how == "compile":
        compile_blocks(other, backend="aot_eager")  # traces as inductor does, without its minute
    else:
        other.gradient_checkpointing()
    assert other.state_dict().keys() == plain.state_dict().keys()
    one, two = (
        fit(start(model, SETTINGS, steps=2), batches(), SETTINGS, steps=2)
        for model in (plain, other)
    )
    for a, b in zip(one, two, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-4)
        assert a.gradient_norm == pytest.approx(b.gradient_norm, rel=1e-3)
        assert (a.tokens, a.dropped, a.idle) == (b.tokens, b.dropped, b.idle)
    largest = max(
        float((a - b).detach().abs().max())
        for a, b in zip(plain.parameters(), other.parameters(), strict=True)
    )
    assert largest < 1e-3
