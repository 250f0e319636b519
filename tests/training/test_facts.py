"""Random facts: what they are, and that a dense T5 and experts made from it learn them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import moezoo
from moezoo.demonstration.closed_book import Book, Learner, Moment, learn, small_t5, verdict
from moezoo.training.facts import VALUES, VOCAB_SIZE, Facts


@given(count=st.integers(1, 300), seed=st.integers(0, 5))
def test_every_fact_is_asked_once_an_epoch_and_has_one_answer(count: int, seed: int) -> None:
    facts = Facts(count, batch_size=1, seed=seed)
    assert len({tuple(row) for row in facts.sources.tolist()}) == count
    answers = dict(zip(map(tuple, facts.sources.tolist()), facts.targets.tolist(), strict=True))
    for epoch in (0, 1):
        batches = [facts(epoch * count + step) for step in range(count)]
        asked = [tuple(batch["input_ids"][0].tolist()) for batch in batches]
        assert sorted(asked) == sorted(answers)
        assert all(
            answers[q] == b["labels"][0].tolist() for q, b in zip(asked, batches, strict=True)
        )
    assert facts.bits == 6 * count
    assert int(facts.targets.max()) < VOCAB_SIZE


def test_batches_are_a_function_of_seed_and_step() -> None:
    facts, again = (Facts(64, batch_size=8, seed=3) for _ in range(2))
    late = again(19)["input_ids"]
    assert torch.equal(facts(19)["input_ids"], late)
    assert torch.equal(again(19)["input_ids"], late)
    assert not torch.equal(Facts(64, batch_size=8, seed=4)(19)["input_ids"], late)


@pytest.mark.parametrize("arguments", [{"count": 0}, {"count": 10, "batch_size": 11}])
def test_nonsense_is_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(moezoo.MoezooError, match="facts|batch size"):
        Facts(**arguments)


def test_an_untrained_model_guesses_and_a_trained_one_recalls() -> None:
    facts = Facts(64, batch_size=64)
    model = moezoo.build(small_t5(), seed=0).train()
    assert facts.recall(model) < 8 / VALUES
    assert learn(model, facts, "dense", steps=150).recall > 0.9
    assert model.training


def test_both_sides_start_from_the_same_recall() -> None:
    book = Book(64, 4, 5)
    for _, train in book.trainings(1):
        train(lambda record: None)
    assert book.dense[0].curve[0].recall == book.switch[0].curve[0].recall
    assert book.switch[0].parameters > book.dense[0].parameters
    assert book.dense[0].curve[-1].step == 5
    assert min(book.rehearsed(2)) > 0
    asks = book.price()
    assert asks.parameters == book.switch[0].parameters / book.dense[0].parameters > 1
    assert 1 < asks.active < asks.parameters


def test_the_moment_of_a_recall_lies_between_two_measurements() -> None:
    curve = (Moment(0, 0.0, 0.2), Moment(10, 1.0, 0.4), Moment(20, 2.0, 0.8))
    learner = Learner("switch", 0, 1, 1, curve)
    assert learner.reaches(0.6) == Moment(15, 1.5, 0.6)
    assert learner.reaches(0.9) is None
    slower = replace(learner, curve=(Moment(0, 0.0, 0.2), Moment(20, 2.0, 0.6)))
    assert "1.3 times fewer steps" in verdict([slower], [learner])
    larger = replace(learner, parameters=3, active=2, curve=(*curve[:2], Moment(20, 3.0, 0.8)))
    said = verdict([learner], [replace(larger, curve=(*larger.curve[:2], Moment(20, 3.0, 0.9)))])
    assert "3.0 times the parameters" in said and "uses 2.00 times" in said
    assert "takes 1.50 times" in said
    assert "dense recalls 80%" in verdict([learner], [slower])
