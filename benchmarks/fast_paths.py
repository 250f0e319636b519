"""What each fast path of docs/architecture.md buys where it stands: the whole with it and without.

    OMP_NUM_THREADS=1 python -m benchmarks.fast_paths    # 5 minutes; writes fast_paths.md

A path is left by putting its condition to False in its own module, as an observer would; runs with
and without it take turns. Figures are of the processor's time, the least of all rounds, which other
work on the machine disturbs least. Paths of a GPU are in gpu.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn

import moezoo
from benchmarks.tables import machine, table
from moezoo import routers
from moezoo.records import Tokens

PAGE = Path(__file__).with_suffix(".md")
ROUNDS, SECONDS = 40, 12.0
WIDTH, HIDDEN = 768, 3072
Run = Callable[[], object]


@dataclass(frozen=True)
class FastPath:
    """A row: what is put to `value` in a module, and the wholes that it is timed in."""

    name: str
    module: str
    attribute: str
    wholes: tuple[str, ...]
    value: bool = False


PATHS = (
    FastPath("layer: one token alone", "layer:MoE", "_is_alone",
          ("layer, 1 token", "small layer, 1 token")),
    FastPath("gates: a plain gate read", "functional.gates", "is_plain_gate",
          ("layer, 1 token", "small layer, 1 token", "layer, 512 tokens")),
    FastPath("gates: softmax in huge pages", "functional.gates", "is_eager",
          ("router of 2,048 experts",)),
    FastPath("assign: best by maximum and windows", "functional.assign", "is_eager",
          ("layer, 1 token", "layer, 512 tokens", "router of 2,048 experts")),
    FastPath("dispatch: gathers as gradients", "functional.dispatch", "is_eager",
          ("layer, 512 tokens, training", "layer of small experts, training")),
    FastPath("dispatch: weighing in place", "functional.dispatch", "is_eager",
          ("layer, 512 tokens", "layer of small experts")),
    FastPath("grouped_mlp: fused", "functional.grouped_mlp", "_fuses",
          ("layer, 512 tokens", "layer, 512 tokens, training")),
    FastPath("products: oneDNN where it is faster", "ops.products", "is_eager",
          ("layer, 512 tokens", "model, training")),
    FastPath("stacked: dropout not called", "experts.stacked", "is_plain",
          ("layer, 512 tokens, training", "layer, dropout, training")),
    FastPath("feed_forward: relu and dropout at once", "models.feed_forward", "is_plain",
          ("model, dropout, training",)),
    FastPath("attention: dropout a part at a time", "models.attention", "is_eager",
          ("model, dropout, training",)),
    FastPath("dropout: cheap random numbers", "functional.dropout", "_cheap",
          ("model, dropout, training",)),
    FastPath("rms_norm: gradient by hand", "functional.rms_norm", "is_eager",
          ("model, forward", "model, training")),
    FastPath("inputs: no mask where nothing is masked", "models.inputs", "is_eager",
          ("model with a mask, forward",)),
    FastPath("cache: keys in buffers", "models.cache", "is_transformed", ("64 tokens",), True),
    FastPath("step: a decoder's step", "models.decoding", "steps_apart", ("64 tokens",)),
    FastPath("int8: one row", "ops.int8", "is_eager", ("64 tokens, int8",)),
)  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for path in PATHS:
        for whole in path.wholes:
            with_it, without = timed(path, whole)
            rows.append([path.name, whole, f"{1e3 * with_it:.2f}", f"{without / with_it:.2f}"])
            print(" | ".join(rows[-1]), flush=True)
    head = ["path", "the whole", "milliseconds with it", "without / with"]
    words = __doc__.partition("\n\n")[2].partition("\n\n")[2].strip()
    text = (
        f"# Fast paths, each alone\n\n`python -m benchmarks.fast_paths`. {words}\n\n{machine()}\n\n"
    )
    PAGE.write_text(text + table(head, rows) + "\n", encoding="utf-8")


def timed(path: FastPath, whole: str) -> tuple[float, float]:
    """The least seconds of the processor that a whole takes, with a path and without."""
    run, best = WHOLES[whole](), [float("inf"), float("inf")]
    began, spent = time.monotonic(), 0
    while spent < 5 or (spent < ROUNDS and time.monotonic() - began < SECONDS):
        for side in (0, 1):
            with left(path) if side else nullcontext():
                run()
                start = time.process_time()
                run()
                best[side] = min(best[side], time.process_time() - start)
        spent += 1
    return best[0], best[1]


@contextmanager
def left(path: FastPath) -> Iterator[None]:
    """Within it, the path is not taken."""
    module, _, owner = path.module.partition(":")
    holder: object = import_module(f"moezoo.{module}")
    holder = getattr(holder, owner) if owner else holder
    with patch.object(holder, path.attribute, lambda *_args, **_named: path.value):
        yield


def _router(experts: int) -> Run:
    router = routers.build("switch", d_model=WIDTH, num_experts=experts).eval()
    tokens = Tokens(torch.randn(2048, WIDTH))
    return torch.no_grad()(lambda: router(tokens))


def _layer(tokens: int, *, width: int = WIDTH, train: bool = False, hidden: int = HIDDEN,
           dropout: float = 0.0) -> Run:  # fmt: skip
    layer = moezoo.SparseMLP(
        width, hidden, num_experts=8, capacity="dropless", dropout=dropout
    ).train(train)
    x = torch.randn(1, tokens, width, requires_grad=train)

    def forward() -> object:
        with torch.no_grad():
            return [layer(x) for _ in range(20 if tokens == 1 else 1)]

    def both() -> None:
        layer(x).sum().backward()
        layer.zero_grad()
        x.grad = None

    return both if train else forward


@cache
def _model(dropout: float = 0.0) -> nn.Module:
    config = moezoo.SwitchConfig(
        vocab_size=2048, d_model=WIDTH, d_kv=64, d_ff=HIDDEN, num_heads=12, num_layers=2,
        num_experts=8, encoder_sparse_layers="odd", decoder_sparse_layers="odd",
        capacity="dropless", dropout_rate=dropout,
    )  # fmt: skip
    return moezoo.build(config, seed=0)


def _batch(mask: bool = False) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 2048, (4, 128))
    batch = {"input_ids": ids, "labels": torch.randint(3, 2048, (4, 48))}
    return {**batch, "attention_mask": torch.ones_like(ids)} if mask else batch


def _forward(mask: bool = False) -> Run:
    model, batch = _model().eval(), _batch(mask)
    return torch.no_grad()(lambda: model(**batch))


def _training(dropout: float = 0.0) -> Run:
    model, batch = _model(dropout).train(), _batch()

    def step() -> None:
        model(**batch).loss.backward()
        model.zero_grad()

    return step


def _generate(int8: bool = False) -> Run:
    model = _model().eval()
    chosen = moezoo.quantize(model) if int8 else model
    ids = torch.randint(3, 2048, (1, 32))
    return lambda: chosen.generate(ids, max_new_tokens=64, min_new_tokens=64)  # type: ignore[operator]


WHOLES: dict[str, Callable[[], Run]] = {
    "layer, 1 token": lambda: _layer(1),
    "layer, 512 tokens": lambda: _layer(512),
    "layer, 512 tokens, training": lambda: _layer(512, train=True),
    "layer, dropout, training": lambda: _layer(512, train=True, dropout=0.1),
    "layer of small experts": lambda: _layer(2048, hidden=64),
    "layer of small experts, training": lambda: _layer(2048, hidden=64, train=True),
    "small layer, 1 token": lambda: _layer(1, width=64, hidden=256),
    "router of 2,048 experts": lambda: _router(2048),
    "model, forward": _forward,
    "model with a mask, forward": lambda: _forward(mask=True),
    "model, training": _training,
    "model, dropout, training": lambda: _training(0.1),
    "64 tokens": _generate,
    "64 tokens, int8": lambda: _generate(int8=True),
}


if __name__ == "__main__":
    main()
