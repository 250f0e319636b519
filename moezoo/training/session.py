"""What the training verbs share: a model, its tokenizer, a recipe, a run, and the finished
model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moezoo.adapters.checkpoint import load, read_config, save
from moezoo.adapters.upcycle.target import trained_choice_words
from moezoo.building import build
from moezoo.config import SwitchConfig
from moezoo.errors import ConfigError, CorruptFile
from moezoo.functional.collective import rank
from moezoo.models.block import Block
from moezoo.presets import preset
from moezoo.registry import Spec
from moezoo.tokenizer import T5_SENTINELS, BaseTokenizer, Tokenizer, fit, tokenizer_of
from moezoo.training.batches import Batches
from moezoo.training.distillation import Distillation, check_student, student_of
from moezoo.training.loop import StepRecord, likelihood
from moezoo.training.model_card import run_card
from moezoo.training.ranks import gathered
from moezoo.training.recipes import TrainingRecipe, recipe
from moezoo.training.run import check_output, run_training
from moezoo.training.sharded import written_together
from moezoo.training.sharding import load_over_ranks, over_ranks
from moezoo.training.smoothing import Smoothed
from moezoo.training.tensorboard import summary_writer

_SETTINGS = (
    "optimizer",
    "learning_rate",
    "schedule",
    "warmup",
    "clip",
    "accumulate",
    "autocast",
    "dropout",
    "expert_dropout",
    "expert_learning_rate",
    "router_learning_rate",
    "teacher_weight",
    "label_smoothing",
)
_OWN_VOCABULARY = 8000


@dataclass(frozen=True)
class Session:
    """A model with its tokenizer, the settings to train it with, and its teacher if it has one."""

    model: nn.Module
    tokenizer: BaseTokenizer
    settings: TrainingRecipe
    distillation: Distillation | None = None


def prepared(
    arguments: argparse.Namespace, *, vocabulary_from: Sequence[str] | None = None
) -> Session:
    """Model, tokenizer and recipe from a verb's arguments.

    Args:
        vocabulary_from: texts to learn a vocabulary from when a model starts from scratch without a
            tokenizer; None: a tokenizer is required.
    """
    resume = arguments.resume or arguments.resume_from is not None
    check_output(arguments.out, resume=resume)
    if arguments.tensorboard:
        summary_writer()  # before a model is read, and on every rank
    torch.manual_seed(arguments.seed)
    changes = {n: getattr(arguments, n) for n in _SETTINGS if getattr(arguments, n) is not None}
    settings = recipe(arguments.recipe).with_changes(**changes)
    teacher = _teacher(arguments)
    learned = None
    if vocabulary_from is not None and _starts_without_words(arguments):
        learned = _learned(arguments, vocabulary_from)
    model = _model(arguments, settings, teacher, learned)
    tokenizer = learned or _tokenizer(arguments)
    config: Any = model.config
    fit(tokenizer, config)
    words = trained_choice_words(config, settings.router_learning_rate)
    if words and rank() == 0:
        print(f"router: {words}", file=sys.stderr)
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing()  # type: ignore[operator]
    if arguments.compile:
        compile_blocks(model)
    if teacher is not None:
        check_student(model, teacher)
    hybrid = bool(arguments.hybrid)
    model = over_ranks(model, ep=arguments.ep, precision=arguments.precision, hybrid=hybrid)
    if teacher is None:
        return Session(model, tokenizer, settings)
    if settings.label_smoothing:
        hint = "Leave --label-smoothing out: a teacher's probabilities are smooth."
        raise ConfigError("there is a teacher", field="label_smoothing", hint=hint)
    return Session(model, tokenizer, settings, Distillation(teacher, settings.teacher_weight))


def compile_blocks(model: nn.Module, *, backend: str = "inductor") -> None:
    """torch.compile every block by itself: names of weights stay, and equal blocks compile once."""
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(dynamic=True, backend=backend)


def execute(
    session: Session,
    batches: Batches,
    held_out: Batches | None,
    arguments: argparse.Namespace,
    facts: Mapping[str, Any],
    *,
    on_step: Callable[[StepRecord], None] | None = None,
) -> int:
    """Run, then write OUT/model with its tokenizer; the exit code is 0, or 143 after a signal."""
    out = Path(arguments.out)
    config: Any = session.model.config
    model = config.to_dict()
    del model["initializer_scale"]  # a run goes on from weights, however they were drawn
    share = session.settings.label_smoothing
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
        objective=session.distillation or (Smoothed(share) if share else likelihood),
        resume_from=arguments.resume_from,
        strict=not arguments.allow_changes,
        tensorboard=arguments.tensorboard,
        on_step=on_step,
        facts={
            **facts,
            "seed": arguments.seed,
            "batch_size": arguments.batch_size,
            "model": model,
            "teacher": _files_digest(arguments.teacher),
            "compiled": arguments.compile,
            "device": arguments.device,
            "precision": arguments.precision,
        },
    )
    if result.interrupted:
        print(f"stopped at step {result.state.step}; go on with --resume")
        return 143
    model_path = out / "model"
    text = run_card(session.model, session.settings, arguments, facts, result)
    save_with_tokenizer(session.model, session.tokenizer, model_path, card=text)
    for step, loss in result.held_out.items():
        print(f"step {step}: held-out {loss:.4f} nats per token")
    print(f"model: {model_path}")
    return 0


def save_with_tokenizer(
    model: nn.Module,
    tokenizer: BaseTokenizer,
    path: Path,
    *,
    overwrite: bool = True,
    card: Callable[[Path], str] | None = None,
) -> None:
    """A checkpoint directory that `moezoo generate` and transformers can use; `card` writes the
    text of its README.md. Every rank of a sharded model calls it.
    """

    def write(stage: Path) -> None:
        save(model, stage / "model", tokenizer=tokenizer)
        if rank() == 0:
            for file in (stage / "model").iterdir():
                file.rename(stage / file.name)
            (stage / "model").rmdir()
            if card is not None:
                (stage / "README.md").write_text(card(stage), encoding="utf-8")

    written_together(path, write, overwrite=overwrite)


def _teacher(arguments: argparse.Namespace) -> nn.Module | None:
    if not arguments.teacher:
        return None
    return load(arguments.teacher, task="conditional_generation", device=arguments.device)


def _model(
    arguments: argparse.Namespace,
    settings: TrainingRecipe,
    teacher: nn.Module | None,
    learned: Tokenizer | None,
) -> nn.Module:
    sources = [n for n in ("source", "model", "config") if getattr(arguments, n, None)]
    if not sources and teacher is not None:
        return student_of(teacher, seed=arguments.seed, **_overrides(arguments, settings, 0))
    if len(sources) != 1:
        hint = "--from a checkpoint, --model a preset, --config a JSON file, or --teacher alone."
        raise ConfigError("say what to train, once", field="model", hint=hint)
    if sources == ["source"]:
        own = read_config(arguments.source)
        overrides = _overrides(arguments, settings, own.num_experts, own.experts)
        return load_over_ranks(
            arguments.source,
            device=arguments.device,
            ep=arguments.ep,
            precision=arguments.precision,
            hybrid=bool(arguments.hybrid),
            **overrides,
        )
    config = _scratch_config(arguments)
    overrides = _overrides(arguments, settings, config.num_experts, config.experts)
    if config.initializer_scale is not None and "initializer_scale" not in overrides:
        _say_scale(arguments)
    if learned is not None and not _says_size(arguments):
        overrides["vocab_size"] = learned.vocab_size
    built: nn.Module = build(config, seed=arguments.seed, device=arguments.device, **overrides)
    return built


def _scratch_config(arguments: argparse.Namespace) -> SwitchConfig:
    """The config of a model from scratch, without what the flags change of it."""
    if arguments.model:
        return preset(arguments.model)
    try:
        return SwitchConfig.from_json(Path(arguments.config).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptFile(f"cannot be read: {error}", path=arguments.config) from None


def _say_scale(arguments: argparse.Namespace) -> None:
    """Say so where a small model has the paper's initial weights only because its file is silent,
    as files of before there was a choice are.
    """
    if rank() == 0 and '"initializer_scale"' not in Path(arguments.config).read_text("utf-8"):
        print(
            "note: no initializer_scale in the config: weights start with the paper's 0.1 of T5's "
            "variance; at this size 1.0 learns faster (--set initializer_scale=null)",
            file=sys.stderr,
        )


def _says_size(arguments: argparse.Namespace) -> bool:
    """Whether the embedding's size was asked for; a preset's is the published vocabulary's."""
    return bool(arguments.config) or "vocab_size" in _set_fields(arguments)


def _overrides(
    arguments: argparse.Namespace,
    settings: TrainingRecipe,
    num_experts: int,
    experts: str | dict[str, Any] = "stacked",
) -> dict[str, Any]:
    """Fields of SwitchConfig that the recipe and the flags set; `--set` has the last word."""
    overrides: dict[str, Any] = {}
    if settings.dropout is not None:
        overrides["dropout_rate"] = settings.dropout
    if settings.expert_dropout is not None and num_experts:
        spec = Spec.parse(experts, kind="expert container")
        options = {**spec.options, "dropout": settings.expert_dropout}
        overrides["experts"] = Spec(spec.name, options).to_json()
    return overrides | _set_fields(arguments)


def _set_fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `--set` says."""
    fields: dict[str, Any] = {}
    for text in arguments.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError("--set takes FIELD=VALUE", field="set", found=text)
        try:
            fields[name] = json.loads(value)
        except ValueError:
            fields[name] = value  # a bare word: a component's name
    return fields


def _files_digest(path: str | None) -> str | None:
    """A digest of a checkpoint's weight files: a run that goes on must have the same teacher."""
    if path is None:
        return None
    root = Path(path)
    files = sorted(root.iterdir()) if root.is_dir() else [root]
    digest = hashlib.sha256()
    for file in files:
        if file.is_file() and file.suffix in (".safetensors", ".bin"):
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:16]


def _starts_without_words(arguments: argparse.Namespace) -> bool:
    """Whether a model starts from scratch and no tokenizer was named."""
    return not arguments.tokenizer and bool(arguments.model or arguments.config)


def _tokenizer(arguments: argparse.Namespace) -> BaseTokenizer:
    source = arguments.tokenizer or getattr(arguments, "source", None) or arguments.teacher
    if not source:
        raise ConfigError("a tokenizer is needed", field="tokenizer", hint="Pass --tokenizer.")
    return tokenizer_of(source)


def _learned(arguments: argparse.Namespace, texts: Sequence[str]) -> Tokenizer:
    """A vocabulary of the texts, of as many pieces as they allow; the one of before where the run
    goes on.
    """
    target = Path(arguments.out) / "spiece.model"
    resumed = arguments.resume or arguments.resume_from is not None
    if rank() == 0 and not (resumed and target.is_file()):
        _learn(target, arguments, texts)
    gathered(None)  # the others read what rank 0 has learnt
    return Tokenizer(target)


def _learn(target: Path, arguments: argparse.Namespace, texts: Sequence[str]) -> None:
    """Write a vocabulary, and say what it is."""
    config = _scratch_config(arguments)
    config = config.replace(**_set_fields(arguments))
    target.parent.mkdir(parents=True, exist_ok=True)
    eos = config.eos_token_id
    tokenizer = Tokenizer.train(
        (line for text in texts for line in text.splitlines() if line.strip()),
        target,
        vocab_size=min(config.vocab_size - T5_SENTINELS, _OWN_VOCABULARY),
        at_most=True,
        pad_id=config.pad_token_id,
        eos_id=eos[0] if isinstance(eos, tuple) else eos,
    )
    rows = config.vocab_size if _says_size(arguments) else tokenizer.vocab_size
    pieces = tokenizer.vocab_size - tokenizer.num_sentinels
    said = f"{pieces:,} pieces and {tokenizer.num_sentinels} sentinels, learned from the text"
    print(f"vocabulary: {said}; the embedding has {rows:,} rows", file=sys.stderr)
