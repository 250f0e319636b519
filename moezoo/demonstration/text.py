"""The text part of the demo: a small T5 on span corruption, and the Switch model made from it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from moezoo.config import SwitchConfig
from moezoo.cost import cost
from moezoo.reporting.trial import Curve, Trial
from moezoo.tokenizer import T5_SENTINELS, Tokenizer
from moezoo.training.batches import ExampleBatches, packed_ids, span_corruption_batches
from moezoo.training.corpus import Document, split
from moezoo.training.loop import (
    StepRecord,
    TrainingState,
    evaluate,
    expert_loads,
    fit,
    mean_of,
    start,
)
from moezoo.training.recipes import recipe
from moezoo.training.span_corruption import SpanCorruption

INPUT_LENGTH = 64
HELD_OUT_BATCHES = 12
SAMPLE_LINES = 200
OnStep = Callable[[StepRecord], None]


@dataclass(frozen=True)
class Material:
    """A tokenizer, and batches of span corruption from text that is trained on and held out.

    sample: lines of the training text, to calibrate routers with.
    """

    tokenizer: Tokenizer
    train: ExampleBatches
    held_out: ExampleBatches
    num_tokens: int
    sample: str

    def loss(self, model: nn.Module) -> float:
        """Held-out cross entropy, in nats per target token."""
        count = min(HELD_OUT_BATCHES, self.held_out.batches_per_epoch)
        return evaluate(model, self.held_out, count=count)["cross_entropy"]


def prepare(
    documents: Sequence[Document], vocabulary: Path, *, vocab_size: int, batch_size: int, seed: int
) -> Material:
    """Learn a vocabulary of `vocab_size` ids, sentinels included, and cut the text into batches.

    Raises TokenizerError or ConfigError when there is too little text.
    """
    train, held_out = split(documents)
    lines = (line for document in train for line in document.text.splitlines() if line.strip())
    tokenizer = Tokenizer.train(lines, vocabulary, vocab_size=vocab_size - T5_SENTINELS)
    corruption = SpanCorruption(tokenizer)
    ids = [packed_ids(part, tokenizer) for part in (train, held_out)]
    trained, held = (
        span_corruption_batches(
            part, corruption, input_length=INPUT_LENGTH, batch_size=batch_size, seed=seed
        )
        for part in ids
    )
    prose = (line for document in train for line in document.text.splitlines() if len(line) > 60)
    sample = "\n".join(itertools.islice(prose, SAMPLE_LINES))
    return Material(tokenizer, trained, held, num_tokens=len(ids[0]), sample=sample)


def small_t5(vocab_size: int) -> SwitchConfig:
    """A dense T5 of 0.3 million parameters at the demo's vocabulary."""
    return SwitchConfig(
        vocab_size=vocab_size,
        d_model=64,
        d_kv=16,
        d_ff=256,
        num_heads=4,
        num_layers=2,
        dropout_rate=0.0,
    )


def train(
    model: nn.Module,
    material: Material,
    *,
    steps: int,
    skip: int = 0,
    points: int = 5,
    on_step: OnStep,
) -> tuple[list[StepRecord], Curve, float]:
    """Train for `steps`, and measure the held-out loss at `points` of them and at both ends.

    Returns the records, the held-out losses, and the processor's seconds of training alone.

    Args:
        skip: batches that were used before; both models of a comparison go on at the same one.
    """
    settings = recipe("small")
    curve: Curve = [(0, material.loss(model))]
    every = max(1, steps // points)
    began, measuring = time.process_time(), 0.0

    def after(state: TrainingState, record: StepRecord) -> None:
        nonlocal measuring
        paused = time.process_time()
        on_step(record)
        if state.step % every == 0 or state.step == steps:
            curve.append((state.step, material.loss(model)))
        measuring += time.process_time() - paused

    records = fit(
        start(model, settings, steps=steps),
        lambda step: material.train(skip + step),
        settings,
        steps=steps,
        on_step=after,
    )
    seconds = time.process_time() - began - measuring
    model.eval()
    return records, curve, seconds


def trial(
    name: str, model: nn.Module, material: Material, *, steps: int, skip: int, on_step: OnStep
) -> Trial:
    """Train a model on, and write down all that was measured."""
    records, curve, seconds = train(model, material, steps=steps, skip=skip, on_step=on_step)
    config = model.config
    assert isinstance(config, SwitchConfig)
    size = cost(config)
    return Trial(
        name=name,
        before=curve[0][1],
        after=curve[-1][1],
        steps=steps,
        seconds=seconds,
        tokens=sum(record.tokens for record in records),
        parameters=size.parameters,
        active=size.active,
        dropped=mean_of(records, "dropped"),
        training=[(record.step, record.losses["cross_entropy"]) for record in records],
        held_out=curve,
        loads=_loads(model, config, material) if config.num_experts else {},
    )


@torch.no_grad()
def _loads(model: nn.Module, config: SwitchConfig, material: Material) -> dict[str, list[float]]:
    """Each expert's share of held-out tokens, by layer."""
    count = min(HELD_OUT_BATCHES, material.held_out.batches_per_epoch)
    names = [f"encoder {i}" for i in config.encoder_sparse]
    names += [f"decoder {i}" for i in config.decoder_sparse]
    stats = expert_loads(model, material.held_out, count=count)
    return {
        name: [load / max(layer.offered, 1) for load in layer.load]
        for name, layer in zip(names, stats, strict=True)
    }
