"""What experts are for, over seeds, with each side's rate tuned: facts learned by heart.

    OMP_NUM_THREADS=1 python -m benchmarks.evidence [TABLE ...]    # 80 minutes of one core

Every trial is first run at each rate of RATES on seed 0, and on beyond them while the best is at
an end; the best rate is then run on the other seeds. Finished trials are lines of --out and are
not run again: a run that was stopped goes on.
evidence.md is written from what is there (`--page` writes it and runs nothing).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

import moezoo
from benchmarks.reproductions import read, widen
from benchmarks.tables import machine, table
from moezoo.adapters.upcycle.folding import fold_factor, folded_config
from moezoo.config import SwitchConfig
from moezoo.demonstration.closed_book import Learner, Moment, learn, small_t5, spread
from moezoo.training.facts import Facts
from moezoo.training.recipes import TrainingRecipe

RESULTS = Path(__file__).with_suffix(".jsonl")
COUNT = 8192
PARENT_STEPS, PARENT_RATE, STEPS = 1600, 8e-3, 800
RATES = (4e-3, 8e-3, 1.6e-2)
SEEDS = (0, 1, 2)
WARMUP = 30
STAY_AFTER = 50  # steps after which we look whether tokens still go to their first expert


@dataclass(frozen=True)
class Trial:
    """A model and its training: from random weights (`scratch`, fields of its config; `widen`
    is a factor on their variance), or the parent going on, upcycled (`upcycle`) or as it is.
    """

    scratch: dict[str, Any] | None = None
    upcycle: dict[str, Any] | None = None
    training: dict[str, Any] = field(default_factory=dict)
    steps: int = STEPS
    widen: float = 1.0


def sparse(experts: int, steps: int, *, widen: float = 10.0, **more: Any) -> Trial:
    """A Switch from scratch, every layer sparse; 10 undoes the 0.1x of its initialisation."""
    layers = {"encoder_sparse_layers": "all", "decoder_sparse_layers": "all"}
    fields = {"num_experts": experts, "capacity": "dropless", **layers, **more}
    return Trial(scratch=fields, steps=steps, widen=widen)


def upcycled(slow: bool = False, **recipe: Any) -> Trial:
    training = {"router_learning_rate": 0.01} if slow else {}
    return Trial(upcycle={"num_experts": 8, "layers": "all", **recipe}, training=training)


def relative(trial: Trial) -> Trial:
    """The same with Adafactor, whose rate is relative to a parameter's size."""
    return replace(trial, training={"optimizer": "adafactor", **trial.training})


_UNIT = {"router": {"name": "switch", "weight": "unit"}}
_WIDE = {"router_init": "normal:0.02"}
_ENCODER = {"decoder_sparse_layers": ()}
_DEEP = {"num_layers": 2, "num_decoder_layers": 2}
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
    "adafactor": {
        "dense goes on": relative(Trial()),
        "exact, as Switch has it": relative(upcycled()),
        "the same, slow router": relative(upcycled(slow=True)),
        "unit weight, router 0.02": relative(upcycled(**_UNIT, **_WIDE)),
        "unit weight, router 0.02, slow": relative(upcycled(slow=True, **_UNIT, **_WIDE)),
    },
}
# Adafactor's rates are relative to the size of a parameter, which is about a quarter here.
SCALE = {"adamw": 1.0, "adafactor": 2.5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tables", nargs="*", choices=[*TABLES, []], help="which; all of them")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSONL of finished trials")
    parser.add_argument("--page", action="store_true", help="write the page and run nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.page:
        for name in options.tables or TABLES:
            for label, trial in TABLES[name].items():
                for row in run(trial, options.out):
                    end, before = row["curve"][-1]["recall"], row["curve"][0]["recall"]
                    print(f"{label}, rate {row['rate']:g}, seed {row['seed']}: "
                          f"{before:.3f} -> {end:.3f}", flush=True)  # fmt: skip
    page(read(options.out), options.out.with_suffix(".md"))


def run(trial: Trial, out: Path) -> Iterator[dict[str, Any]]:
    """The trials that are not there yet: all rates on the first seed, the best on the others."""
    rates = list(rates_of(trial))
    while rates:
        for rate in rates:
            yield from _one(trial, rate, SEEDS[0], out)
        rates = beyond(trial, read(out))
    for seed in SEEDS[1:]:
        yield from _one(trial, best_rate(trial, read(out)), seed, out)


def _one(trial: Trial, rate: float, seed: int, out: Path) -> Iterator[dict[str, Any]]:
    key = key_of(trial, rate, seed)
    if any(row["key"] == key for row in read(out)):
        return
    facts = Facts(COUNT, seed=seed)
    model = _model(trial, seed)
    skip = 0 if trial.scratch is not None else PARENT_STEPS
    before = [] if trial.upcycle is None else _choices(model, facts)
    changes = {"learning_rate": rate, **trial.training}
    settings = _settings().with_changes(**changes)
    stayed: list[float] = []

    def after(record: Any) -> None:
        if before and record.step == STAY_AFTER:
            stayed.append(_stayed(before, _choices(model, facts)))

    learner = learn(model, facts, "", steps=trial.steps, skip=skip, settings=settings,
                    on_step=after)  # fmt: skip
    row = {"key": key, "rate": rate, "stayed": stayed[0] if before else None,
           "folded": _folded(model, facts), **learner.to_dict()}  # fmt: skip
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    yield row


def key_of(trial: Trial, rate: float, seed: int) -> str:
    """What decides a trial's numbers, as one line of JSON."""
    return json.dumps({"rate": rate, "seed": seed, "facts": COUNT, **asdict(trial)}, sort_keys=True)


def rates_of(trial: Trial) -> tuple[float, ...]:
    """The rates that a trial begins with."""
    scale = SCALE[trial.training.get("optimizer", "adamw")]
    return tuple(scale * rate for rate in RATES)


def tried(trial: Trial, rows: list[dict[str, Any]]) -> dict[float, float]:
    """Recall at the end by rate, on the first seed."""
    ends = {row["key"]: (row["rate"], row["curve"][-1]["recall"]) for row in rows}
    wanted = {key_of(trial, rate, SEEDS[0]) for rate, _ in ends.values()}
    return dict(ends[key] for key in wanted & ends.keys())


def beyond(trial: Trial, rows: list[dict[str, Any]]) -> list[float]:
    """The next rate, where the best of those tried is the least or the largest."""
    recall = tried(trial, rows)
    best = max(recall, key=recall.__getitem__)
    return [2 * best] * (best == max(recall)) + [best / 2] * (best == min(recall))


def best_rate(trial: Trial, rows: list[dict[str, Any]]) -> float:
    """The rate with the highest recall at the end, on the first seed."""
    recall = tried(trial, rows) or {rates_of(trial)[0]: 0.0}
    return max(recall, key=recall.__getitem__)


def _settings() -> TrainingRecipe:
    return TrainingRecipe(schedule="linear", warmup=WARMUP)


def _model(trial: Trial, seed: int) -> nn.Module:
    if trial.scratch is not None:
        model = moezoo.build(small_t5().replace(**trial.scratch), seed=seed)
        if trial.scratch:
            widen(model, trial.widen)
        return model
    parent = moezoo.build(small_t5(), seed=seed)
    parent.load_state_dict(_parent(seed))
    return parent if trial.upcycle is None else moezoo.upcycle(parent, **trial.upcycle, seed=seed)


@cache
def _parent(seed: int) -> dict[str, torch.Tensor]:
    """The weights of the dense model that all trials of a seed go on from."""
    model = moezoo.build(small_t5(), seed=seed)
    settings = _settings().with_changes(learning_rate=PARENT_RATE)
    learn(model, Facts(COUNT, seed=seed), "parent", steps=PARENT_STEPS, settings=settings)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def _choices(model: nn.Module, facts: Facts) -> list[torch.Tensor]:
    """The experts that the tokens of a batch go to, by sparse layer; empty for a dense model."""
    training = model.training
    routings = model.eval()(**facts(0)).routing
    model.train(training)
    return [routing.assignment.expert.clone() for routing in routings]


def _stayed(before: list[torch.Tensor], now: list[torch.Tensor]) -> float:
    """The share of choices that are the same, the least of all layers."""
    pairs = zip(before, now, strict=True)
    return min((float((a == b).float().mean()) for a, b in pairs), default=1.0)


def _folded(model: nn.Module, facts: Facts) -> float | None:
    """Recall of a model of unit weight in the layout of transformers' Switch (`export --fold`)."""
    config = model.config
    assert isinstance(config, SwitchConfig)
    if not isinstance(config.router, Mapping) or config.router.get("weight") != "unit":
        return None
    plain = moezoo.build(folded_config(config))
    state = model.state_dict()
    factors = {name: fold_factor(name, config.num_experts) for name in state}
    plain.load_state_dict({name: factors[name] * tensor for name, tensor in state.items()})
    return facts.recall(plain)


def page(rows: list[dict[str, Any]], path: Path) -> None:
    """Every table that has trials, as Markdown."""
    rates = ", ".join(f"{rate:g}" for rate in RATES)
    parts = [
        "# Evidence\n\n`python -m benchmarks.evidence`; "
        f"{COUNT:,} facts ({Facts(COUNT).bits / 1000:.0f} kbit), d_model 32, d_ff 64, 1 + 1 "
        f"layers, every layer sparse, batches of 512, AdamW, linear decay to 0, each row at its "
        f"best rate of {rates} on seed {SEEDS[0]}; mean (least to most) "
        f"of {len(SEEDS)} seeds. Seconds are of the processor.\n\n{machine()}"
    ]
    for name, trials in TABLES.items():
        goal = _of(trials.get("dense, 3,200 steps", next(iter(trials.values()))), rows)
        head = ["", "best rate", "recall", "steps to dense's end", "seconds to it", "seconds",
                "parameters", "tokens that stay"]  # fmt: skip
        body = [_row(label, trial, rows, goal) for label, trial in trials.items()]
        if any(body):
            words = f"Upcycled after {PARENT_STEPS:,} steps, {STEPS} further"
            words = {"scratch": "From scratch", "adafactor": f"{words}, Adafactor"}.get(name, words)
            parts.append(f"## {words}\n\n" + table(head, [line for line in body if line]))
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _of(trial: Trial, rows: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """A trial's rows at its best rate, by seed."""
    rate = best_rate(trial, rows)
    keys = {key_of(trial, rate, seed): seed for seed in SEEDS}
    return {keys[row["key"]]: row for row in rows if row["key"] in keys}


def _row(
    label: str, trial: Trial, rows: list[dict[str, Any]], goal: dict[int, dict[str, Any]]
) -> list[str]:
    found = _of(trial, rows)
    if len(found) < len(SEEDS):
        return []
    reached = []
    for seed, row in found.items():
        learner = Learner(label, seed, 0, 0, tuple(Moment(**m) for m in row["curve"]))
        moment = learner.reaches(goal[seed]["curve"][-1]["recall"]) if seed in goal else None
        reached.append(moment)
    all_reach = all(moment is not None for moment in reached)
    stay = [row["stayed"] for row in found.values() if row["stayed"] is not None]
    return [
        label,
        f"{best_rate(trial, rows):g}",
        spread([row["curve"][-1]["recall"] for row in found.values()], ".3f"),
        spread([float(m.step) for m in reached if m], ".0f") if all_reach else "-",
        spread([m.seconds for m in reached if m], ".1f") if all_reach else "-",
        f"{mean(row['curve'][-1]['seconds'] for row in found.values()):.1f}",
        f"{next(iter(found.values()))['parameters']:,}",
        f"{mean(stay):.0%}" if stay else "-",
    ]


if __name__ == "__main__":
    main()
