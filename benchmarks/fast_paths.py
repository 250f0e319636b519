"""What each fast path of docs/architecture.md buys where it stands: the whole with it and without.

    OMP_NUM_THREADS=1 python -m benchmarks.fast_paths [--only WORD ...]

A path is left by putting its condition to False in its own module, as an observer would. Runs with
and without it come in pairs whose order alternates; a ratio is the median over all pairs of what
one run without it takes over the one beside it with it, so that other work on the machine, which
lasts longer than a pair, touches both sides. Over 1 a path is worth having. Processor time is of
one thread, clock time is beside it. Paths of a GPU are in gpu.md. Writes fast_paths.md; with --only
it measures paths that have a WORD in their names, and writes nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from statistics import median, quantiles
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

import moezoo
from benchmarks.tables import machine, table
from moezoo import routers
from moezoo.functional.assign import best_experts
from moezoo.functional.gated_units import SiluGate
from moezoo.functional.routed_mlp import Networks, routed_mlp
from moezoo.models import stepper
from moezoo.records import Tokens

PAGE = Path(__file__).with_suffix(".md")
LEAST, MOST = 9, 400  # pairs
WIDTH, HIDDEN = 768, 3072
Run = Callable[[], object]


def _no(*_args: object, **_named: object) -> bool:
    return False


@dataclass(frozen=True)
class FastPath:
    """A row: what a module's attribute is replaced by, and the wholes that it is timed in."""

    name: str
    module: str
    attribute: str
    wholes: tuple[str, ...]
    plain: Callable[..., object] = _no


LARGE_ROUTER = ("router of 2,048 experts", "router of 2,048 experts, training")
PATHS = (
    FastPath("layer: one token alone", "layer:MoE", "_is_alone",
          ("layer, 1 token", "small layer, 1 token")),
    FastPath("gates: a plain gate read", "functional.gates", "is_plain_gate",
          ("layer, 1 token", "small layer, 1 token", "layer, 512 tokens")),
    FastPath("gates: softmax in huge pages", "functional.gates", "in_huge_pages", LARGE_ROUTER),
    FastPath("products: scores in stretches", "ops.products", "in_huge_pages", LARGE_ROUTER),
    FastPath("assign: windows", "functional.assign", "_window",
          ("choice of 256 experts", "choice of 2,048 experts", "2 of 2,048 experts",
           "router of 2,048 experts")),
    FastPath("streamed: scores in chunks", "functional.streamed", "is_eager",
          ("streamed router of 2,048 experts",)),
    FastPath("dispatch: gathers as gradients", "functional.dispatch", "is_eager",
          ("layer, 512 tokens, training", "layer of small experts, training",
           "layer of small experts, two of them, training")),
    FastPath("grouped_mlp: fused", "functional.grouped_mlp", "_fuses",
          ("layer, 1 token, training", "layer, 64 tokens, training", "layer, 512 tokens",
           "layer, 512 tokens, training")),
    FastPath("routed_mlp: fused", "functional.routed_mlp", "_fuses",
          ("gated experts, 1 token", "gated experts, 512 tokens",
           "gated experts, 512 tokens, training")),
    FastPath("row_sums: a token's rows in one pass", "ops.row_sums", "is_eager",
          ("layer of small experts, two of them", "layer of small experts, two of them, training",
           "gated experts, 512 tokens")),
    FastPath("products: oneDNN where it is faster", "ops.products", "is_eager",
          ("layer, 512 tokens", "model, training", "64 tokens")),
    FastPath("stacked: dropout not called", "experts.stacked", "is_plain",
          ("layer, 512 tokens, training", "layer, dropout, training")),
    FastPath("feed_forward: relu and dropout at once", "models.feed_forward", "is_plain",
          ("model, dropout, training",)),
    FastPath("attention: dropout a part at a time", "models.attention", "is_eager",
          ("model, dropout, training",)),
    FastPath("dropout: cheap random numbers", "functional.dropout", "_cheap",
          ("model, dropout, training",)),
    FastPath("rms_norm: gradient by hand", "functional.rms_norm", "is_eager",
          ("model, training",)),
    FastPath("cache: keys in buffers", "models.cache", "is_transformed",
          ("64 tokens by modules", "256 tokens by modules"), lambda: True),
    FastPath("step: a decoder's step", "models.step:Step", "fits", ("64 tokens",)),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD")
    parser.add_argument("--seconds", type=float, default=8.0, help="at least, per row")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for path in PATHS:
        if any(word in path.name for word in options.only):
            for whole in path.wholes:
                rows.append([path.name, whole, *cells(timed(path, whole, options.seconds))])
                print(" | ".join(rows[-1]), flush=True)
    if options.only == [""]:
        PAGE.write_text("\n\n".join(page(rows)) + "\n", encoding="utf-8")


def timed(path: FastPath, whole: str, seconds: float) -> dict[str, list[tuple[float, float]]]:
    """Processor and clock seconds of a whole, pair by pair: each first with the path."""
    run = WHOLES[whole]()
    spent: dict[str, list[tuple[float, float]]] = {"processor": [], "clock": []}
    began, pair = 0.0, -1  # the first one warms up
    while pair < LEAST or (pair < MOST and time.perf_counter() - began < seconds):
        costs = {}
        for without in (pair % 2 == 0, pair % 2 != 0):
            with left(path) if without else nullcontext():
                start, clock = time.process_time(), time.perf_counter()
                run()
                costs[without] = time.process_time() - start, time.perf_counter() - clock
        if pair >= 0:
            for kind, key in enumerate(spent):
                spent[key].append((costs[False][kind], costs[True][kind]))
        else:
            began = time.perf_counter()
        pair += 1
    return spent


def page(rows: Sequence[Sequence[str]]) -> list[str]:
    """The sections of fast_paths.md."""
    words = __doc__.partition("\n\n")[2].partition("\n\n")[2].strip()
    head = ["path", "the whole", "ms with it", "without / with, processor", "clock", "pairs"]
    return [
        "# Fast paths, each alone",
        f"`python -m benchmarks.fast_paths`, {machine()}. {words}",
        "Milliseconds and ratios are medians; in brackets the middle half of the ratios.",
        table(head, rows),
    ]


def cells(spent: dict[str, list[tuple[float, float]]]) -> list[str]:
    found = [f"{1e3 * median(with_it for with_it, _ in spent['processor']):.3g}"]
    for pairs in spent.values():
        low, middle, high = quantiles([without / with_it for with_it, without in pairs], n=4)
        found.append(f"{middle:.3f} ({low:.2f} to {high:.2f})")
    return [*found, str(len(spent["clock"]))]


@contextmanager
def left(path: FastPath) -> Iterator[None]:
    """Within it, the path is not taken."""
    module, _, owner = path.module.partition(":")
    holder: object = import_module(f"moezoo.{module}")
    holder = getattr(holder, owner) if owner else holder
    with patch.object(holder, path.attribute, path.plain):
        yield


def _router(train: bool = False, name: str = "switch") -> Run:
    router = routers.build(name, d_model=WIDTH, num_experts=2048).train(train)
    tokens = Tokens(torch.randn(8192, WIDTH))

    def both() -> None:
        router(tokens).assignment.weight.sum().backward()
        router.zero_grad()

    return both if train else torch.no_grad()(lambda: router(tokens))


def _choice(experts: int, k: int = 1) -> Run:
    scores = torch.randn(8192, experts).softmax(-1)
    return lambda: best_experts(scores, k)


def _layer(tokens: int, *, width: int = WIDTH, train: bool = False, hidden: int = HIDDEN,
           dropout: float = 0.0, **options: Any) -> Run:  # fmt: skip
    layer = moezoo.SparseMLP(
        width, hidden, num_experts=8, capacity="dropless", dropout=dropout, **options
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


def _gated(tokens: int = 512, train: bool = False) -> Run:
    """Experts as transformers stacks them: 8 of 64."""
    up = torch.randn(64, 768, 1024).mul(0.02).requires_grad_(train)
    down = torch.randn(64, 1024, 384).mul(0.02).requires_grad_(train)
    networks = Networks(up, down, SiluGate(), pure=True)
    x = torch.randn(tokens, 1024, requires_grad=train)
    weight, expert = torch.rand(tokens, 64).softmax(-1).topk(8, dim=-1)

    def run() -> None:
        for _ in range(8 if tokens == 1 else 1):
            y = routed_mlp(x, expert, weight, networks)
            if train:
                torch.autograd.grad(y.sum(), (x, up, down))

    return run


@cache
def _model(dropout: float = 0.0) -> nn.Module:
    config = moezoo.SwitchConfig(
        vocab_size=2048, d_model=WIDTH, d_kv=64, d_ff=HIDDEN, num_heads=12, num_layers=2,
        num_experts=8, encoder_sparse_layers="odd", decoder_sparse_layers="odd",
        capacity="dropless", dropout_rate=dropout,
    )  # fmt: skip
    return moezoo.build(config, seed=0)


def _batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 2048, (2, 128))
    return {"input_ids": ids, "labels": torch.randint(3, 2048, (2, 48))}


def _training(dropout: float = 0.0) -> Run:
    model, batch = _model(dropout).train(), _batch()

    def step() -> None:
        model(**batch).loss.backward()
        model.zero_grad()

    return step


def _generate(tokens: int = 64, *, modules: bool = False) -> Run:
    model: Any = _model().eval()
    ids = torch.randint(3, 2048, (1, 32))

    def run() -> object:
        with patch.object(stepper, "STEPS", ()) if modules else nullcontext():
            return model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens)

    return run


WHOLES: dict[str, Callable[[], Run]] = {
    "layer, 1 token": lambda: _layer(1),
    "layer, 1 token, training": lambda: _layer(1, train=True),
    "layer, 64 tokens, training": lambda: _layer(64, train=True),
    "layer, 512 tokens": lambda: _layer(512),
    "layer, 512 tokens, training": lambda: _layer(512, train=True),
    "layer, dropout, training": lambda: _layer(512, train=True, dropout=0.1),
    "layer of small experts": lambda: _layer(2048, hidden=64),
    "layer of small experts, training": lambda: _layer(2048, hidden=64, train=True),
    "layer of small experts, two of them": lambda: _layer(2048, hidden=64, router="top_k"),
    "layer of small experts, two of them, training": lambda: _layer(
        2048, hidden=64, train=True, router="top_k"
    ),
    "small layer, 1 token": lambda: _layer(1, width=64, hidden=256),
    "gated experts, 1 token": lambda: _gated(1),
    "gated experts, 512 tokens": _gated,
    "gated experts, 512 tokens, training": lambda: _gated(train=True),
    "router of 2,048 experts": _router,
    "router of 2,048 experts, training": lambda: _router(train=True),
    "streamed router of 2,048 experts": lambda: _router(name="streamed_switch"),
    "choice of 256 experts": lambda: _choice(256),
    "choice of 2,048 experts": lambda: _choice(2048),
    "2 of 2,048 experts": lambda: _choice(2048, 2),
    "model, training": _training,
    "model, dropout, training": lambda: _training(0.1),
    "64 tokens": _generate,
    "64 tokens by modules": lambda: _generate(modules=True),
    "256 tokens by modules": lambda: _generate(256, modules=True),
}


if __name__ == "__main__":
    main()
