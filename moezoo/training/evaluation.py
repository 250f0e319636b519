"""How well a model does a task: loss, generated answers, metrics, and a table of examples."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from moezoo.errors import ConfigError, MissingExtra
from moezoo.functional.collective import num_ranks, rank
from moezoo.tokenizer import BaseTokenizer
from moezoo.training.batches import pair_batches
from moezoo.training.datasets import dataset_rows
from moezoo.training.loop import evaluate
from moezoo.training.ranks import gathered, of_rank
from moezoo.training.tasks import (
    METRICS,
    Pair,
    Task,
    docstring_pairs,
    identifier_pairs,
    pair_of,
    read_pairs,
    split_pairs,
    task,
)

_BATCH = 16


def chosen_task(arguments: argparse.Namespace) -> Task:
    """The named task with what the arguments change of it."""
    changes = {
        "source": arguments.source_field,
        "target": arguments.target_field,
        "prefix": arguments.prefix,
        "num_beams": arguments.num_beams,
    }
    given = {name: value for name, value in changes.items() if value is not None}
    return replace(task(arguments.task), **given)


def task_pairs(arguments: argparse.Namespace, chosen: Task) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs of a task, from files or from the embedded text: of pairs that
    come without held-out ones, every tenth.
    """
    fields = {"source": chosen.source, "target": chosen.target}
    given = given_pairs(arguments, fields)
    if arguments.held_out_pairs:
        held = read_pairs(arguments.held_out_pairs, header=not arguments.no_header, **fields)
        return given or [], held
    return toy_pairs(arguments.task) if given is None else every_tenth(given)


def scored_pairs(arguments: argparse.Namespace, chosen: Task) -> list[Pair]:
    """What `evaluate` scores: all pairs that it is given, the held-out ones of a toy task."""
    fields = {"source": chosen.source, "target": chosen.target}
    given = given_pairs(arguments, fields)
    return toy_pairs(arguments.task)[1] if given is None else given


def given_pairs(arguments: argparse.Namespace, fields: dict[str, str]) -> list[Pair] | None:
    """The pairs of `--pairs` or else of `--dataset`; None where neither is given."""
    if arguments.pairs:
        return read_pairs(arguments.pairs, header=not arguments.no_header, **fields)
    if not arguments.dataset:
        return None
    return [
        pair_of(row, f"row {number}", arguments.dataset, **fields)
        for number, row in enumerate(dataset_rows(arguments.dataset), 1)
    ]


def toy_pairs(name: str) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs of a toy task. Raises ConfigError for another one."""
    toys = {"identifiers": identifier_pairs, "docstrings": docstring_pairs}
    if name not in toys:
        hint = "Pass --pairs FILE, or a toy task."
        raise ConfigError(f"task {name!r} needs pairs", field="pairs", hint=hint)
    return split_pairs(toys[name]())


def every_tenth(pairs: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on, and every tenth held out."""
    return [pair for i, pair in enumerate(pairs) if i % 10 != 9], pairs[9::10]


def measurable(chosen: Task, complain: Callable[[str], object]) -> Task:
    """The task with those of its metrics whose packages are installed; each of the others is
    complained of before an hour of training, not after it.
    """
    kept = []
    for name in chosen.metrics:
        try:
            METRICS[name](["a"], ["a"])
        except MissingExtra as lack:
            complain(f"warning: {name} will not be measured: {lack}")
        else:
            kept.append(name)
    return replace(chosen, metrics=tuple(kept))


def measured(
    model: nn.Module, tokenizer: BaseTokenizer, pairs: Sequence[Pair], chosen: Task
) -> tuple[dict[str, float], list[str]]:
    """Cross entropy and the task's metrics on pairs, and the answers."""
    batches = pair_batches(
        pairs,
        tokenizer,
        batch_size=_BATCH,
        prefix=chosen.prefix,
        max_source=chosen.max_source,
        max_target=chosen.max_target,
    )
    every = of_rank(batches.of_all)
    loss = evaluate(model, every, count=batches.batches_of_all)["cross_entropy"]
    answers = answered(model, tokenizer, [source for source, _ in pairs], chosen)
    wanted = [target for _, target in pairs]
    metrics = {name: METRICS[name](answers, wanted) for name in chosen.metrics}
    return {"cross_entropy": loss, "examples": len(pairs), **metrics}, answers


@torch.no_grad()
def answered(
    model: Any, tokenizer: BaseTokenizer, sources: Sequence[str], chosen: Task
) -> list[str]:
    """A generated answer for each source, on every rank; ranks share the work."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    own: list[list[str]] = []
    for start in range(0, len(sources), _BATCH * num_ranks()):
        part = sources[start : start + _BATCH * num_ranks()]
        first, last = (len(part) * (rank() + i) // num_ranks() for i in (0, 1))
        # Who has no source takes part all the same: the others may wait for it.
        texts = [chosen.prefix + source for source in part[first:last] or part[:1]]
        batch = tokenizer.batch(texts, max_length=chosen.max_source)
        ids = model.generate(
            batch.input_ids.to(device),
            batch.attention_mask.to(device),
            max_new_tokens=chosen.max_target,
            num_beams=chosen.num_beams,
        )
        own.append([tokenizer.decode(row[1:]) for row in ids][: last - first])
    model.train(was_training)
    parts = zip(*gathered(own), strict=True)
    return [answer for part in parts for answers in part for answer in answers]


def report(
    model: nn.Module, tokenizer: BaseTokenizer, pairs: Sequence[Pair], chosen: Task
) -> dict[str, float]:
    """Print metrics and a few examples; returns the metrics."""
    metrics, answers = measured(model, tokenizer, pairs, chosen)
    for name, value in metrics.items():
        print(f"{name:<14} {value:.4g}")
    for (source, target), answer in list(zip(pairs, answers, strict=True))[:5]:
        print(f"\n  source  {source[:90]}\n  wanted  {target[:90]}\n  found   {answer[:90]}")
    return metrics
