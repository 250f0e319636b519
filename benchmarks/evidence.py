"""What experts are for, over seeds, with each side's rate tuned: facts learned by heart, and text
that never repeats.

    OMP_NUM_THREADS=1 python -m benchmarks.evidence [TABLE ...]    # 80 minutes of one core
    OMP_NUM_THREADS=1 python -m benchmarks.evidence text text-upcycling --text FILE    # 50 more

Every trial is first run at each rate that its task begins with on seed 0, and on beyond them while
the best is at an end; the best rate is then run on the other seeds. Finished trials are lines of
--out and are not run again: a run that was stopped goes on. evidence.md is written from what is
there (`--page` writes it and runs nothing).
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.evidence_facts import Book
from benchmarks.evidence_page import page, pictures
from benchmarks.evidence_text import STEPS as TEXT_STEPS
from benchmarks.evidence_text import Text
from benchmarks.evidence_tuning import Task, Trial, run
from benchmarks.reproductions import read

RESULTS = Path(__file__).with_suffix(".jsonl")


def sparse(experts: int, steps: int, *, widen: float = 10.0, **more: Any) -> Trial:
    """A Switch from scratch, every layer sparse; 10 undoes the 0.1x of its initialisation."""
    layers = {"encoder_sparse_layers": "all", "decoder_sparse_layers": "all"}
    fields = {"num_experts": experts, "capacity": "dropless", **layers, **more}
    return Trial(scratch=fields, steps=steps, widen=widen)


def upcycled(slow: bool = False, steps: int = 800, **recipe: Any) -> Trial:
    training = {"router_learning_rate": 0.01} if slow else {}
    upcycle = {"num_experts": 8, "layers": "all", **recipe}
    return Trial(upcycle=upcycle, training=training, steps=steps)


def relative(trial: Trial) -> Trial:
    """The same with Adafactor, whose rate is relative to a parameter's size."""
    return replace(trial, training={"optimizer": "adafactor", **trial.training})


_UNIT = {"router": {"name": "switch", "weight": "unit"}}
_WIDE = {"router_init": "normal:0.02"}
_ENCODER = {"decoder_sparse_layers": ()}
_DEEP = {"num_layers": 2, "num_decoder_layers": 2}
_TWICE = {"d_model": 64, "d_ff": 128, "num_heads": 8}
TABLES: dict[str, dict[str, Trial]] = {
    "upcycling": {
        "dense goes on": Trial(),
        "exact, as Switch has it": upcycled(),
        "the same, slow router": upcycled(slow=True),
        "unit weight, router 0.02": upcycled(**_UNIT, **_WIDE),
        "unit weight, router 0.02, slow": upcycled(slow=True, **_UNIT, **_WIDE),
        "top 2, router 0.02, slow": upcycled(slow=True, router={"name": "top_k", "k": 2}, **_WIDE),
        "virtual groups of 2, router 0.5": upcycled(
            init="virtual_group:2", router_init="normal:0.5"
        ),
        "unit weight, slow, half of d_ff redrawn": upcycled(
            slow=True, init="drop:0.5", **_UNIT, **_WIDE
        ),
    },
    "scratch": {
        "dense, 800 steps": Trial(scratch={}),
        "dense, 1,600 steps": Trial(scratch={}, steps=1600),
        "dense, 3,200 steps": Trial(scratch={}, steps=3200),
        "8 experts, 800 steps": sparse(8, 800),
        "8 experts, 800 steps, 0.1x initialisation": sparse(8, 800, widen=1.0),
        "8 experts, 1,600 steps": sparse(8, 1600),
        "32 experts, 800 steps": sparse(32, 800),
        "64 experts, 800 steps": sparse(64, 800),
        "8 experts in the encoder alone, 800 steps": sparse(8, 800, **_ENCODER),
        "the same, Expert Choice": sparse(
            8, 800, **_ENCODER, router="expert_choice", capacity=None
        ),
        "2 + 2 layers, dense, 800 steps": Trial(scratch=_DEEP),
        "2 + 2 layers, 8 experts, 800 steps": sparse(8, 800, **_DEEP),
    },
    "larger": {
        "d_model 64, dense, 800 steps": Trial(scratch=_TWICE),
        "d_model 64, 8 experts, 800 steps": sparse(8, 800, **_TWICE),
    },
    "adafactor": {
        "dense goes on": relative(Trial()),
        "exact, as Switch has it": relative(upcycled()),
        "the same, slow router": relative(upcycled(slow=True)),
        "unit weight, router 0.02": relative(upcycled(**_UNIT, **_WIDE)),
        "unit weight, router 0.02, slow": relative(upcycled(slow=True, **_UNIT, **_WIDE)),
    },
    "text": {
        "dense": Trial(scratch={}, steps=TEXT_STEPS),
        "8 experts": sparse(8, TEXT_STEPS),
        "8 experts, slow router": replace(
            sparse(8, TEXT_STEPS), training={"router_learning_rate": 0.1}
        ),
        "8 experts, 0.1x initialisation": sparse(8, TEXT_STEPS, widen=1.0),
    },
    "text-upcycling": {
        "dense goes on": Trial(steps=TEXT_STEPS),
        "unit weight, router 0.02, slow": upcycled(slow=True, steps=TEXT_STEPS, **_UNIT, **_WIDE),
        "exact, as Switch has it": upcycled(steps=TEXT_STEPS),
    },
}
TEXTS = ("text", "text-upcycling")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("tables", nargs="*", choices=[*TABLES, []], help="which; all on facts")
    parser.add_argument("--text", type=Path, help="a file of text: what `moezoo train` takes")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSONL of finished trials")
    parser.add_argument("--page", action="store_true", help="write the page and run nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = options.tables or [name for name in TABLES if name not in TEXTS]
    if any(name in TEXTS for name in names) and options.text is None and not options.page:
        parser.error("say which text: --text FILE (benchmarks/manual_pages.py makes one)")
    if not options.page:
        tasks: dict[bool, Task] = {False: Book()}
        if options.text is not None:
            tasks[True] = Text(options.text)
        for name in names:
            for label, trial in TABLES[name].items():
                task = tasks[name in TEXTS]
                for row in run(task, trial, options.out):
                    ends = (f"{abs(task.moments(row)[i].recall):.3f}" for i in (0, -1))
                    print(f"{label}, rate {row['rate']:g}, seed {row['seed']}: "
                          f"{' -> '.join(ends)}", flush=True)  # fmt: skip
    rows = read(options.out)
    page(TABLES, rows, options.out.with_suffix(".md"))
    pictures(TABLES, rows)


if __name__ == "__main__":
    main()
