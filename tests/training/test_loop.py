"""The loop: it learns, accumulates rightly, reports, and stops at NaN with the weights unharmed."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch

import moezoo
from moezoo.layer import MoE
from moezoo.training.batches import ExampleBatches, pair_batches, span_corruption_batches
from moezoo.training.corpus import (
    Document,
    file_documents,
    python_documents,
    split,
    stdlib_sources,
)
from moezoo.training.loop import evaluate, expert_loads, fit, start
from moezoo.training.recipes import RECIPES, TrainingRecipe, rate_factor, recipe
from moezoo.training.span_corruption import SpanCorruption
from tests.training.text import packed, small_model, tokenizer


def batches(batch_size: int = 4, seed: int = 0) -> ExampleBatches:
    corruption = SpanCorruption(tokenizer())
    return span_corruption_batches(
        packed(), corruption, input_length=32, batch_size=batch_size, seed=seed
    )


def test_a_few_steps_lower_the_loss_and_every_record_is_filled() -> None:
    model, data = small_model(), batches(16)
    before = evaluate(model, data, count=4)["cross_entropy"]
    settings = TrainingRecipe(learning_rate=5e-3)
    records = fit(start(model, settings, steps=25), data, settings, steps=25)
    assert evaluate(model, data, count=4)["cross_entropy"] < before - 0.3
    last = records[-1]
    assert [r.step for r in records] == list(range(1, 26))
    assert set(last.losses) == {"cross_entropy", "load_balance", "z"}
    assert last.gradient_norm > 0
    assert last.tokens > 0
    assert last.tokens_per_second > 0
    assert 0 <= last.dropped < 1
    assert 0 < last.entropy <= math.log(4) + 1e-6
    assert last.max_violation >= 0
    loads = expert_loads(model, data, count=2)
    assert len(loads) == 2
    assert all(sum(layer.load) == layer.tokens for layer in loads)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_routers_adapt_to_all_routings_of_their_own_layer_once_per_step(accumulate: int) -> None:
    router = {"name": "sigmoid_top_k", "k": 1, "bias_rate": 0.5}
    model = small_model(router=router, dropout_rate=0.0)
    settings, data = TrainingRecipe(accumulate=accumulate), batches(4)
    model.train()
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    wanted = [torch.zeros(4) for _ in layers]
    for part in range(accumulate):
        for load, routing in zip(wanted, model(**data(part)).routing, strict=True):
            load += torch.bincount(routing.proposed.expert[routing.proposed.kept], minlength=4)
    fit(start(model, settings, steps=1), data, settings, steps=1)
    for layer, load in zip(layers, wanted, strict=True):
        assert torch.equal(layer.router.expert_bias, 0.5 * torch.sign(load.mean() - load))


def test_a_batch_depends_on_its_step_alone() -> None:
    one, two = batches(), batches()
    per_epoch = one.batches_per_epoch
    for step in (0, 3, per_epoch, 5, per_epoch + 2):
        for name, tensor in one(step).items():
            assert torch.equal(two(step)[name], tensor)
    assert not torch.equal(one(0)["labels"], batches(seed=1)(0)["labels"])
    first = sorted(one.order(0))
    assert first == sorted(one.order(1)) == list(range(one.count)), "an epoch sees each once"
    assert one.order(0) != one.order(1)


def test_accumulation_equals_one_large_batch() -> None:
    data = batches(8)
    whole = data(0)
    short = whole["labels"].clone()
    short[4:, 3:] = -100  # halves of different numbers of targets
    whole["labels"] = short
    halves = [{n: t[i : i + 4] for n, t in whole.items()} for i in (0, 4)]
    model = small_model(router_losses={}, dropout_rate=0.0, capacity="dropless")
    twin = copy.deepcopy(model)
    one = TrainingRecipe(clip=0.0)
    two = one.with_changes(accumulate=2)
    fit(start(model, one, steps=1), lambda step: whole, one, steps=1)
    fit(start(twin, two, steps=1), lambda step: halves[step], two, steps=1)
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("autocast", [None, "bfloat16"])
def test_every_optimizer_and_precision_trains(optimizer: str, autocast: str | None) -> None:
    settings = TrainingRecipe(optimizer, 1e-2, autocast=autocast)
    records = fit(start(small_model(), settings, steps=12), batches(8), settings, steps=12)
    assert records[-1].loss < records[0].loss


def test_a_nan_stops_the_run_names_its_place_and_leaves_the_weights() -> None:
    model = small_model()
    settings = RECIPES["small"]
    state = start(model, settings, steps=5)
    fit(state, batches(), settings, steps=2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    handle = model.encoder.blocks[1].mlp.experts.register_forward_hook(
        lambda module, inputs, output: output * float("nan")
    )
    with pytest.raises(moezoo.MoezooError, match="step 3"):
        fit(state, batches(), settings, steps=5)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    records = fit(state, batches(), settings, steps=4, nonfinite="skip")
    assert [r.skipped for r in records] == [True, True]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    handle.remove()
    assert not fit(state, batches(), settings, steps=5)[-1].skipped


def test_on_step_can_end_a_run() -> None:
    settings = RECIPES["small"]
    state = start(small_model(), settings, steps=9)
    assert len(fit(state, batches(), settings, steps=9, on_step=lambda s, r: r.step == 2)) == 2


def test_schedules_warm_up_and_decay_as_published() -> None:
    inverse = rate_factor(TrainingRecipe(schedule="inverse_sqrt", warmup=100), 1000)
    assert inverse(0) == 0.01
    assert inverse(99) == 1.0
    assert inverse(399) == pytest.approx(0.5)
    linear = rate_factor(TrainingRecipe(schedule="linear", warmup=10), 110)
    assert (linear(10), linear(60), linear(110)) == (1.0, 0.5, 0.0)
    constant = rate_factor(TrainingRecipe(warmup=2), 10)
    assert [constant(i) for i in range(4)] == [0.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"optimizer": "adamv"}, "adamw"),
        ({"schedule": "cosine"}, "schedule"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"accumulate": 0}, "accumulate"),
        ({"autocast": "float16"}, "autocast"),
    ],
)
def test_bad_settings_are_named(options: dict[str, object], field: str) -> None:
    with pytest.raises(moezoo.MoezooError, match=field):
        TrainingRecipe(**options)
    with pytest.raises(moezoo.MoezooError, match="pretrain"):
        recipe("pretran")


def test_pairs_of_similar_length_share_a_batch_and_none_is_lost() -> None:
    pairs = [("word " * (1 + i % 17), f"target {i}") for i in range(64)]
    data = pair_batches(pairs, tokenizer(), batch_size=4, prefix="say: ")
    seen = []
    for step in range(data.batches_per_epoch):
        batch = data(step)
        lengths = batch["attention_mask"].sum(1)
        assert lengths.max() - lengths.min() <= 6
        seen += [row[row >= 0].tolist() for row in batch["labels"]]
    assert sorted(seen) == sorted(tokenizer().encode(target) for _, target in pairs)


def test_the_embedded_text_is_english_and_splits_by_document() -> None:
    documents = python_documents()
    train, held = split(documents)
    assert sum(len(d.text) for d in documents) > 1_000_000
    assert {d.name for d in train}.isdisjoint(d.name for d in held)
    assert 0.03 < len(held) / len(documents) < 0.2
    assert split(documents)[1] == held


def test_what_is_no_source_in_the_library_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "words.py").write_text(f'"""{"A docstring. " * 20}"""')
    (tmp_path / "sitecustomize.py").symlink_to(tmp_path / "nowhere.py")  # as on a slim system
    (tmp_path / "latin.py").write_bytes(b'"""\xe9"""')
    (tmp_path / "other.py").write_text("print 1")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    assert [name for name, _ in stdlib_sources()] == ["words.py"]
    assert python_documents()[-1].name == "module words.py"


def test_files_become_documents_and_bad_lines_are_named(tmp_path: object) -> None:
    folder = tmp_path
    text, rows = folder / "a.txt", folder / "b.jsonl"  # type: ignore[operator]
    text.write_text("one\ntwo\n\nthree")
    rows.write_text('{"text": "four"}\n\n{"text": "five"}\n')
    found = [d.text for d in file_documents([text, rows])]
    assert found == ["one\ntwo", "three", "four", "five"]
    rows.write_text('{"text": "four"}\n{"txt": 1}\n')
    with pytest.raises(moezoo.MoezooError, match="line 2"):
        file_documents([rows])
    with pytest.raises(moezoo.MoezooError, match="missing.txt"):
        file_documents([folder / "missing.txt"])  # type: ignore[operator]
    assert split([Document("a", "x"), Document("b", "y")])[1]
