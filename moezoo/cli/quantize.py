"""`moezoo quantize`: what int8 weights would save and cost for a checkpoint, on a text."""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from moezoo.cli.samples import add_sample_arguments, named_tokenizer, sample_batches

if TYPE_CHECKING:
    from torch import Tensor, nn

Batch = dict[str, "Tensor"]


@dataclass
class _Sums:
    """What is added up over the batches."""

    squared_error: float = 0.0
    squared: float = 0.0
    equal: int = 0
    tokens: int = 0
    loss: float = 0.0
    loss_int8: float = 0.0
    seconds: float = 0.0
    seconds_int8: float = 0.0


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("source", help="a checkpoint with its tokenizer")
    add_sample_arguments(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Run the model and its int8 twin on the same batches; nothing is written."""
    import torch

    from moezoo.adapters.checkpoint import load
    from moezoo.quantization import quantize

    model: Any = load(arguments.source, task="conditional_generation", dtype=torch.float32)
    tokenizer = named_tokenizer(arguments.tokenizer, arguments.source, model.config)
    rounded = copy.deepcopy(model)
    done = quantize(rounded)
    sums = _Sums()
    with torch.no_grad():
        for batch in sample_batches(arguments, tokenizer, "quantize"):
            _compare(model, rounded, batch, sums)
    found = {
        "mib": done.bytes_before / 2**20,
        "mib_int8": done.bytes_after / 2**20,
        "loss": sums.loss / sums.tokens,
        "loss_int8": sums.loss_int8 / sums.tokens,
        "relative_error": (sums.squared_error / max(sums.squared, 1e-300)) ** 0.5,
        "equal_tokens": sums.equal / sums.tokens,
        "milliseconds": 1e3 * sums.seconds / arguments.batches,
        "milliseconds_int8": 1e3 * sums.seconds_int8 / arguments.batches,
    }
    if arguments.json:
        print(json.dumps({**found, **asdict(done)}, indent=1))
        return 0
    _print(found)
    print(f"\n{done}\n\nIn a program: moezoo.quantize(model). A quantised model is not saved.")
    return 0


def _compare(model: nn.Module, rounded: nn.Module, batch: Batch, sums: _Sums) -> None:
    begin = time.perf_counter()
    ours = model(**batch)
    middle = time.perf_counter()
    theirs = rounded(**batch)
    sums.seconds += middle - begin
    sums.seconds_int8 += time.perf_counter() - middle
    real = batch["labels"] != -100
    expected, found = ours.logits[real].double(), theirs.logits[real].double()
    count = int(real.sum())
    sums.squared += float(expected.square().sum())
    sums.squared_error += float((found - expected).square().sum())
    sums.equal += int((expected.argmax(-1) == found.argmax(-1)).sum())
    sums.loss += count * float(ours.losses["cross_entropy"])
    sums.loss_int8 += count * float(theirs.losses["cross_entropy"])
    sums.tokens += count


def _print(found: dict[str, float]) -> None:
    from moezoo.cli.terminal import table

    rows = [
        ("weights, MiB", f"{found['mib']:,.1f}", f"{found['mib_int8']:,.1f}"),
        ("loss, nats per token", f"{found['loss']:.4f}", f"{found['loss_int8']:.4f}"),
        ("forward, ms", f"{found['milliseconds']:.1f}", f"{found['milliseconds_int8']:.1f}"),
        ("error of the logits, relative", "", f"{found['relative_error']:.2%}"),
        ("most probable token unchanged", "", f"{found['equal_tokens']:.2%}"),
    ]
    print(table(("", "as stored", "int8"), rows))
