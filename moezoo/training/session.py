"""What the training verbs share: a model, its tokenizer, a recipe, a run, and the finished
model.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moezoo.adapters.checkpoint import load, save
from moezoo.adapters.writer import replacing_directory
from moezoo.building import build
from moezoo.config import SwitchConfig
from moezoo.errors import ConfigError, CorruptFile
from moezoo.presets import preset
from moezoo.registry import Spec
from moezoo.tokenizer import ByteTokenizer, Tokenizer, tokenizer_of
from moezoo.training.batches import Batches
from moezoo.training.recipes import TrainingRecipe, recipe
from moezoo.training.run import check_output, run_training

_SETTINGS = ("optimizer", "learning_rate", "schedule", "warmup", "clip", "accumulate", "autocast")
_OWN_VOCABULARY = 8000


@dataclass(frozen=True)
class Session:
    """A model with its tokenizer and the settings to train it with."""

    model: nn.Module
    tokenizer: Tokenizer | ByteTokenizer
    settings: TrainingRecipe


def prepared(
    arguments: argparse.Namespace, *, vocabulary_from: Sequence[str] | None = None
) -> Session:
    """Model, tokenizer and recipe from a verb's arguments.

    Args:
        vocabulary_from: texts to learn a vocabulary from when a model starts from scratch without a
            tokenizer; None: a tokenizer is required.
    """
    check_output(arguments.out, resume=arguments.resume)
    torch.manual_seed(arguments.seed)
    model = _model(arguments)
    tokenizer = _tokenizer(arguments, model, vocabulary_from)
    config: Any = model.config
    if config.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            "the tokenizer has more ids than the model has embeddings",
            field="tokenizer",
            expected=f"at most {config.vocab_size}",
            found=tokenizer.vocab_size,
        )
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing()  # type: ignore[operator]
    changes = {n: getattr(arguments, n) for n in _SETTINGS if getattr(arguments, n) is not None}
    return Session(model, tokenizer, recipe(arguments.recipe).with_changes(**changes))


def execute(
    session: Session,
    batches: Batches,
    held_out: Batches | None,
    arguments: argparse.Namespace,
    facts: Mapping[str, Any],
) -> int:
    """Run, then write OUT/model with its tokenizer; the exit code is 0, or 143 after a signal."""
    out = Path(arguments.out)
    config: Any = session.model.config
    result = run_training(
        session.model,
        batches,
        session.settings,
        out,
        steps=arguments.steps,
        held_out=held_out,
        evaluate_every=arguments.evaluate_every,
        save_every=arguments.save_every,
        table_every=arguments.table_every,
        nonfinite=arguments.nonfinite,
        facts={**facts, "seed": arguments.seed, "batch_size": arguments.batch_size}
        | {"model": config.to_dict()},
    )
    if result.interrupted:
        print(f"stopped at step {result.state.step}; go on with --resume")
        return 143
    save_with_tokenizer(session.model, session.tokenizer, out / "model")
    for step, loss in result.held_out.items():
        print(f"step {step}: held-out {loss:.4f} nats per token")
    print(f"model: {out / 'model'}")
    return 0


def save_with_tokenizer(
    model: nn.Module, tokenizer: Tokenizer | ByteTokenizer, path: Path, *, overwrite: bool = True
) -> None:
    """A checkpoint directory that `moezoo generate` and transformers can use."""
    with replacing_directory(path, overwrite=overwrite) as stage:
        save(model, stage / "model")
        for file in (stage / "model").iterdir():
            file.rename(stage / file.name)
        (stage / "model").rmdir()
        if isinstance(tokenizer, Tokenizer):
            shutil.copyfile(tokenizer.path, stage / "spiece.model")
        kind = "T5Tokenizer" if isinstance(tokenizer, Tokenizer) else "ByT5Tokenizer"
        settings = {"tokenizer_class": kind, "extra_ids": tokenizer.num_sentinels}
        (stage / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _model(arguments: argparse.Namespace) -> nn.Module:
    sources = [n for n in ("source", "model", "config") if getattr(arguments, n, None)]
    if len(sources) != 1:
        hint = "--from a checkpoint, --model a preset, or --config a JSON file."
        raise ConfigError("say what to train, once", field="model", hint=hint)
    overrides = _overrides(arguments)
    if sources == ["source"]:
        return load(arguments.source, task="conditional_generation", **overrides)
    if sources == ["model"]:
        config = preset(arguments.model)
    else:
        try:
            config = SwitchConfig.from_json(Path(arguments.config).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise CorruptFile(f"cannot be read: {error}", path=arguments.config) from None
    return build(config, seed=arguments.seed, **overrides)


def _overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    overrides: dict[str, Any] = {}
    if arguments.dropout is not None:
        overrides["dropout_rate"] = arguments.dropout
    if arguments.expert_dropout is not None:
        spec = Spec("stacked", {"dropout": arguments.expert_dropout})
        overrides["experts"] = spec.to_json()
    return overrides


def _tokenizer(
    arguments: argparse.Namespace, model: nn.Module, vocabulary_from: Sequence[str] | None
) -> Tokenizer | ByteTokenizer:
    if arguments.tokenizer:
        path = Path(arguments.tokenizer)
        return tokenizer_of(path) if path.is_dir() else Tokenizer(path)
    if getattr(arguments, "source", None):
        return tokenizer_of(arguments.source)
    if vocabulary_from is None:
        raise ConfigError("a tokenizer is needed", field="tokenizer", hint="Pass --tokenizer.")
    target = Path(arguments.out) / "spiece.model"
    if target.is_file():
        return Tokenizer(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    config: Any = model.config
    size = min(config.vocab_size - 100, _OWN_VOCABULARY)
    lines = (line for text in vocabulary_from for line in text.splitlines() if line.strip())
    return Tokenizer.train(lines, target, vocab_size=size)
