"""Text that never repeats, for benchmarks/evidence.py: a file of the user's, one epoch of it.

A trial from scratch reads the batches from 0 on, one that goes on those after its parent's; a seed
decides their order. benchmarks/manual_pages.py makes such a file.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import moezoo
from benchmarks.evidence_tuning import Row, Trial
from benchmarks.reproductions import PUBLISHED, widen
from moezoo.config import SwitchConfig
from moezoo.cost import cost
from moezoo.demonstration.closed_book import Moment
from moezoo.demonstration.text import INPUT_LENGTH
from moezoo.errors import ConfigError
from moezoo.tokenizer import T5_SENTINELS, Tokenizer
from moezoo.training.batches import ExampleBatches, packed_ids, span_corruption_batches
from moezoo.training.corpus import file_documents, fingerprint, split
from moezoo.training.loop import StepRecord, TrainingState, evaluate, fit, start
from moezoo.training.recipes import TrainingRecipe
from moezoo.training.span_corruption import SpanCorruption

SIZES: dict[str, Any] = {
    "vocab_size": 2048,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_heads": 4,
    "num_layers": 1,
    "dropout_rate": 0.0,
}
STEPS, BATCH_SIZE, POINTS = 1000, 64, 10
PARENT_RATE = 3.2e-2  # the best from scratch
HELD_OUT_BATCHES = 24
VOCABULARY_DOCUMENTS = 400  # a vocabulary is learned from these; all of them would take an hour
SETTINGS = TrainingRecipe(schedule="linear", warmup=30)


class Text:
    """The task: span corruption on the text of a file, one epoch at most.

    Args:
        file: what `moezoo train --text` takes; None: its digest is enough to find its rows.
        digest: of the text.
    """

    def __init__(self, file: Path | None, digest: str = "") -> None:
        self.file = file
        self.documents = [] if file is None else file_documents([file])
        self.digest = digest if file is None else fingerprint(d.text for d in self.documents)
        self._parents: dict[tuple[int, float], dict[str, Tensor]] = {}

    def key(self, trial: Trial, rate: float, seed: int) -> str:
        batch = {"text": self.digest, "batch_size": BATCH_SIZE}
        return json.dumps({"rate": rate, "seed": seed, **batch, **asdict(trial)}, sort_keys=True)

    def rates(self, trial: Trial) -> tuple[float, ...]:
        # What goes on has learned already, and a high rate throws it away first.
        return (4e-3, 8e-3, 1.6e-2) if trial.scratch is not None else (2e-3, 4e-3, 8e-3)

    def moments(self, row: Row) -> tuple[Moment, ...]:
        """Recall stands for -loss."""
        return tuple(Moment(m["step"], m["seconds"], -m["loss"]) for m in row["curve"])

    def measure(self, trial: Trial, rate: float, seed: int) -> Row:
        model = self._model(trial, seed)
        skip = 0 if trial.scratch is not None else STEPS
        settings = SETTINGS.with_changes(learning_rate=rate, **trial.training)
        curve = self._learned(model, settings, seed, trial.steps, skip)
        if trial.scratch == {}:
            self._parents[seed, rate] = _copied(model)
        config = model.config
        assert isinstance(config, SwitchConfig)
        size = cost(config)
        return {"parameters": size.parameters, "active": size.active, "curve": curve}

    def _learned(
        self, model: nn.Module, settings: TrainingRecipe, seed: int, steps: int, skip: int
    ) -> list[dict[str, float]]:
        """Train, and measure on held-out text; in seconds neither measuring nor making batches."""
        curve: list[dict[str, float]] = []
        batches = self._batches(seed)
        if skip + steps > batches.batches_per_epoch:
            found = f"{batches.batches_per_epoch * BATCH_SIZE * INPUT_LENGTH:,} tokens"
            needs = f"at least {(skip + steps) * BATCH_SIZE * INPUT_LENGTH:,}"
            raise ConfigError(
                "the text would repeat", field="text", expected=needs, found=found,
                hint="Give --text a larger file.",
            )  # fmt: skip
        began, apart = time.process_time(), 0.0

        def measure(step: int) -> None:
            nonlocal apart
            now = time.process_time()
            curve.append({"step": step, "seconds": now - began - apart, "loss": self._loss(model)})
            apart += time.process_time() - now

        def batch(step: int) -> dict[str, Tensor]:
            nonlocal apart
            now = time.process_time()
            made = self._batch(seed, skip + step)
            apart += time.process_time() - now
            return made

        def after(state: TrainingState, record: StepRecord) -> None:
            if state.step % max(1, steps // POINTS) == 0 or state.step == steps:
                measure(state.step)

        measure(0)
        fit(start(model, settings, steps=steps), batch, settings, steps=steps, on_step=after)
        return curve

    def _model(self, trial: Trial, seed: int) -> nn.Module:
        if trial.scratch is not None:
            config = SwitchConfig(**{**SIZES, **PUBLISHED, **trial.scratch})
            model = moezoo.build(config, seed=seed)
            widen(model, trial.widen)
            return model
        parent = moezoo.build(SwitchConfig(**SIZES), seed=seed)
        parent.load_state_dict(self._parent(seed))
        if trial.upcycle is None:
            return parent
        return moezoo.upcycle(parent, **trial.upcycle, seed=seed)

    def _parent(self, seed: int) -> dict[str, Tensor]:
        """Weights of the dense model of `STEPS` steps, kept from its trial or trained again."""
        rate = PARENT_RATE
        if (seed, rate) not in self._parents:
            self.measure(Trial(scratch={}, steps=STEPS), rate, seed)
        return self._parents[seed, rate]

    def _loss(self, model: nn.Module) -> float:
        """Held-out cross entropy in nats per target token; the same batches for all seeds."""
        held = self._material()[2]
        count = min(HELD_OUT_BATCHES, held.batches_per_epoch)
        return evaluate(model, lambda step: self._held_out(step), count=count)["cross_entropy"]

    @cache  # noqa: B019  one task a process
    def _held_out(self, step: int) -> dict[str, Tensor]:
        return self._material()[2](step)

    @cache  # noqa: B019
    def _batch(self, seed: int, step: int) -> dict[str, Tensor]:
        return self._batches(seed)(step)

    @cache  # noqa: B019
    def _batches(self, seed: int) -> ExampleBatches:
        corruption, trained, _ = self._material()
        return span_corruption_batches(
            trained, corruption, input_length=INPUT_LENGTH, batch_size=BATCH_SIZE, seed=seed
        )

    @cache  # noqa: B019
    def _material(self) -> tuple[SpanCorruption, Tensor, ExampleBatches]:
        """The vocabulary's task, ids to train on, and held-out batches."""
        train, held = split(self.documents)
        some = train[:VOCABULARY_DOCUMENTS]
        lines = (line for document in some for line in document.text.splitlines())
        size = SIZES["vocab_size"] - T5_SENTINELS
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = Tokenizer.train(lines, Path(folder, "text.model"), vocab_size=size)
        corruption = SpanCorruption(tokenizer)
        kept = span_corruption_batches(
            packed_ids(held, tokenizer), corruption, input_length=INPUT_LENGTH,
            batch_size=BATCH_SIZE,
        )  # fmt: skip
        return corruption, packed_ids(train, tokenizer), kept


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
