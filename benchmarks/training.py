"""Training steps of a small Switch model next to transformers, from the same weights.

    python -m benchmarks.training [--rounds 3] [--steps 40] [--optimizers adamw adafactor]

A step is forward, backward, gradient clipping to 1.0 and the optimizer of torch with the same
settings: AdamW fused, or Adafactor. Both train on the same batches of span corruption, made
beforehand from the English text of CPython, with dropout 0.1 (in the experts too), jitter 0.01 and
a load-balance loss of 0.01; transformers' capacity never binds, so that both compute every token.
Each round runs one process per library, in turns. The first five steps of a process are not timed.
"loss" is the cross entropy in nats per target token, mean of the last ten steps; the two differ by
the random numbers of dropout. "MiB" is the peak of the process above what its imports took.
Writes benchmarks/training.json and training.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn

import moezoo
from benchmarks.peers import peak_mib, theirs
from benchmarks.tables import machine, milliseconds, ratio, save, table
from moezoo.tokenizer import T5_SENTINELS, Tokenizer
from moezoo.training.batches import IGNORED, packed_ids, span_corruption_batches
from moezoo.training.corpus import python_documents, split
from moezoo.training.span_corruption import SpanCorruption

SIDES = ("moezoo", "transformers")
OPTIMIZERS = ("adamw", "adafactor")
VOCABULARY = 4096
BALANCE = 0.01
UNTIMED = 5
CONFIG = moezoo.SwitchConfig(
    vocab_size=VOCABULARY,
    d_model=256,
    d_kv=32,
    d_ff=1024,
    num_heads=8,
    num_layers=4,
    num_experts=8,
    dropout_rate=0.1,
    router={"name": "switch", "jitter": 0.01},
    capacity="dropless",
    router_losses={"load_balance": BALANCE},
)
Batch = dict[str, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    sizes = {"rounds": 3, "steps": 40, "batch": 16, "length": 128}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(""))
    parser.add_argument("--worker", nargs=3, metavar=("SIDE", "OPTIMIZER", "BATCHES"))
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(*options.worker)))
        return
    if options.steps < UNTIMED + 10:
        parser.error(f"--steps is at least {UNTIMED + 10}")
    results: dict[str, dict[str, list[dict[str, Any]]]] = {
        optimizer: {side: [] for side in SIDES} for optimizer in options.optimizers
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "batches.pt"
        prepare(path, options.steps, options.batch, options.length)
        for number in range(options.rounds):
            for optimizer, sides in results.items():
                for side, found in sides.items():
                    found.append(run(side, optimizer, path))
                    what = f"round {number + 1} of {options.rounds}: {optimizer}, {side}"
                    print(f"{what}, loss {found[-1]['loss']:.4f}", flush=True)
    chosen = {name: getattr(options, name) for name in sizes}
    record = {"machine": machine(), "options": chosen, "results": results}
    save(options.out, record, page(record))
    print(options.out.with_suffix(".md").read_text())


def prepare(path: Path, steps: int, batch: int, length: int) -> None:
    """Write the batches of all steps: span corruption of the embedded text."""
    train, _ = split(python_documents())
    lines = (line for document in train for line in document.text.splitlines() if line.strip())
    tokenizer = Tokenizer.train(
        lines, path.with_suffix(".model"), vocab_size=VOCABULARY - T5_SENTINELS
    )
    made = span_corruption_batches(
        packed_ids(train, tokenizer),
        SpanCorruption(tokenizer),
        input_length=length,
        batch_size=batch,
    )
    torch.save([made(step) for step in range(steps)], path)


def run(side: str, optimizer: str, path: Path) -> dict[str, Any]:
    """A process of its own for one library."""
    command = [sys.executable, "-m", "benchmarks.training", "--worker", side, optimizer, str(path)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(side: str, optimizer: str, path: str) -> dict[str, Any]:
    """Train one library's model in this process: seconds of every step, loss and memory."""
    batches: list[Batch] = torch.load(path, weights_only=True)
    if side == "transformers":
        import transformers

        assert transformers.SwitchTransformersForConditionalGeneration  # it is imported lazily
    held = peak_mib()
    model = moezoo.build(CONFIG, seed=0)
    forward = our_loss
    if side == "transformers":
        model, forward = theirs(model), their_loss
        model.router_aux_loss_coef, model.router_z_loss_coef = BALANCE, 0.0
    model.train()
    update = made_optimizer(optimizer, model)
    torch.manual_seed(0)
    seconds, losses = [], []
    for batch in batches:
        start = time.perf_counter()
        loss, cross_entropy = forward(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        update.step()
        update.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
        losses.append(float(cross_entropy.detach()))
    tokens = [int(b["attention_mask"].sum() + (b["labels"] != IGNORED).sum()) for b in batches]
    return {
        "seconds": seconds[UNTIMED:],
        "tokens": mean(tokens[UNTIMED:]),
        "first loss": losses[0],
        "loss": mean(losses[-10:]),
        "MiB": peak_mib() - held,
        "MiB of the process": peak_mib(),
    }


def our_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    output = model(**batch)
    return output.loss, output.losses["cross_entropy"]


def their_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    output = model(**batch, output_router_logits=True)
    balance = output.encoder_aux_loss + output.decoder_aux_loss
    return output.loss, output.loss.detach() - BALANCE * balance.detach()


def made_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    return torch.optim.Adafactor(model.parameters(), lr=1e-2, weight_decay=0.0)


def page(record: dict[str, Any]) -> list[str]:
    """The sections of training.md."""
    rows = []
    for optimizer, sides in record["results"].items():
        times = [[t for r in sides[side] for t in r["seconds"]] for side in SIDES]
        rates = [
            sides[side][0]["tokens"] / median(found)
            for side, found in zip(SIDES, times, strict=True)
        ]
        for what, cells in (
            ("step, ms", [*map(milliseconds, times), ratio(times[1], times[0])]),
            ("tokens/s", [*(f"{r:,.0f}" for r in rates), f"{rates[0] / rates[1]:.2f}"]),
            *((what, _compared(sides, what)) for what in ("MiB", "MiB of the process")),
            *((what, _losses(sides, what)) for what in ("first loss", "loss")),
        ):
            rows.append([optimizer, what, *cells])
    config, sizes = CONFIG, record["options"]
    shape = (
        f"d_model {config.d_model}, d_ff {config.d_ff}, {config.num_layers} + "
        f"{config.decoder_layers} layers, half of them with {config.num_experts} experts; "
        "batches of {batch} x {length} source tokens, {steps} steps, {rounds} rounds"
    )
    intro = __doc__.split("\n\n")[-1].strip()
    return [
        "# Training steps of a model",
        f"`python -m benchmarks.training`, {record['machine']}. {intro}",
        f"{shape.format(**sizes)}. Times are median (min) of all rounds; the last column is above "
        "1 where moezoo is faster or smaller.",
        table(["optimizer", "what", *SIDES, "moezoo ahead by"], rows),
    ]


def _compared(sides: dict[str, list[dict[str, Any]]], what: str) -> list[str]:
    values = [median(r[what] for r in sides[side]) for side in SIDES]
    return [*(f"{value:,.0f}" for value in values), f"{values[1] / values[0]:.2f}"]


def _losses(sides: dict[str, list[dict[str, Any]]], what: str) -> list[str]:
    return [*(f"{mean(r[what] for r in sides[side]):.3f}" for side in SIDES), ""]


if __name__ == "__main__":
    main()
