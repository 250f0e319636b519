"""Small reproductions on the English text of CPython: claims of the papers at a laptop's size.

    OMP_NUM_THREADS=1 python -m benchmarks.reproductions [TABLE ...]
    python -m benchmarks.reproductions_page

A seed decides weights, the order of batches and the noise of a router; all trials of a seed see the
same batches. Finished trials are lines of --out and are not run again: a run that was stopped goes
on, and tables share the trials that they have in common.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import moezoo
from moezoo.adapters.upcycle.calibration import Calibration
from moezoo.demonstration.text import Material, prepare
from moezoo.functional.assign import token_choice
from moezoo.records import Routing, Tokens
from moezoo.routers import SwitchRouter
from moezoo.routers.base import registry
from moezoo.training.corpus import python_documents
from moezoo.training.loop import StepRecord, TrainingState, evaluate, fit, mean_of, start
from moezoo.training.recipes import TrainingRecipe

SIZES: dict[str, Any] = {
    "vocab_size": 1024,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 256,
    "num_heads": 4,
    "num_layers": 2,
    "dropout_rate": 0.0,
}
PUBLISHED = {"initializer_scale": 0.1}  # what a trial's `widen` multiplies, at any size
RESULTS = Path(__file__).with_suffix(".jsonl")
BATCH_SIZE = 16
HELD_OUT_BATCHES = 24
POINTS = 5
RATE = 2e-3
WARMUP = 30
_MATRIX = re.compile(r"attention\.[qkvo]\.weight$|\.mlp\.(experts\.)?w[io]")


class BFloat16SwitchRouter(SwitchRouter):
    """The switch router with its logits and its softmax in bfloat16, as the paper's table 2 has."""

    def forward(self, tokens: Tokens) -> Routing:
        weight = self.classifier.weight.bfloat16()
        logits_TE = tokens.x.bfloat16() @ weight.T
        probs_TE = logits_TE.softmax(dim=-1).float()
        assignment = token_choice(probs_TE, probs_TE, 1, tokens)
        return Routing(assignment, logits=logits_TE.float(), probs=probs_TE, real=tokens.real)


@dataclass(frozen=True)
class Trial:
    """A model and how it is trained.

    upcycle: the recipe that turns the seed's dense model into it. scratch: fields of the config of
    a model that starts from random weights. Neither: the dense model goes on. training: changes of
    the training recipe. losses: router losses; None: the router's own. widen: factor on the
    variance of the initial weights, which is 1.0x for dense models and 0.1x for sparse ones.
    """

    upcycle: dict[str, Any] | None = None
    scratch: dict[str, Any] | None = None
    training: dict[str, Any] = field(default_factory=dict)
    losses: dict[str, Any] | None = None
    widen: float = 1.0


def upcycled(
    training: dict[str, Any] | None = None, losses: dict[str, Any] | None = None, **recipe: Any
) -> Trial:
    return Trial(upcycle={"num_experts": 8, **recipe}, training=training or {}, losses=losses)


def switch(training: dict[str, Any] | None = None, *, widen: float = 1.0, **fields: Any) -> Trial:
    scratch = {"num_experts": 8, "capacity": "dropless", **fields}
    return Trial(scratch=scratch, training=training or {}, widen=widen)


_UNIT = {"name": "switch", "weight": "unit"}
_CALIBRATED = "mean_orthogonal"
_WIDE = {"name": "mean_orthogonal", "std": 0.02}
_BIAS = {"name": "sigmoid_top_k", "k": 1, "bias_rate": 0.01}
_TOP_2 = {"name": "top_k", "k": 2}
_BFLOAT16 = {"autocast": "bfloat16"}

TABLES: dict[str, dict[str, Trial]] = {
    "upcycling": {
        "dense goes on": Trial(),
        "switch from scratch, 0.1x": switch(),
        "switch from scratch, 1.0x": switch(widen=10.0),
        "plain copy": upcycled(preserve="none"),
        "exact (the default)": upcycled(),
        "exact, mean_orthogonal": upcycled(router_init=_CALIBRATED),
        "mean_orthogonal, load_balance 0.1": upcycled(
            losses={"load_balance": 0.1}, router_init=_CALIBRATED
        ),
        "exact, unit weight": upcycled(router=_UNIT, router_init=_WIDE),
        "unit weight, rate of experts x 3": upcycled(
            {"expert_learning_rate": 3.0}, router=_UNIT, router_init=_WIDE
        ),
        "unit weight, half of d_ff redrawn": upcycled(
            router=_UNIT, router_init=_WIDE, init="drop:0.5"
        ),
        "unit weight, noise 0.1": upcycled(router=_UNIT, router_init=_WIDE, init="noise:0.1"),
        "exact, virtual groups of 2": upcycled(init="virtual_group:2", router_init=_CALIBRATED),
        "exact, 8 slices, all chosen": upcycled(init="split", router_init=_CALIBRATED),
        "exact, 2 of 8 experts chosen": upcycled(router=_TOP_2, router_init=_CALIBRATED),
        "exact, 2 experts": upcycled(num_experts=2, router_init=_CALIBRATED),
    },
    "experts": {
        "dense": Trial(scratch={}),
        **{f"{count} experts": switch(num_experts=count, widen=10.0) for count in (2, 4, 8, 16)},
    },
    "experts-0.1x": {
        "dense": Trial(scratch={}, widen=0.1),
        **{f"{count} experts": switch(num_experts=count) for count in (2, 4, 8, 16)},
    },
    "balance": {
        "no balancing": switch(router_losses={}),
        "load_balance 0.01": switch(),
        "bias, rate 0.01": switch(router=_BIAS, router_losses={}),
    },
    "initialisation": {
        "0.1x": switch(),
        "1.0x": switch(widen=10.0),
    },
    "capacity": {
        **{
            f"factor {factor}": switch(capacity={"name": "switch", "factor": factor})
            for factor in (0.5, 1.0, 1.25, 2.0)
        },
        "dropless": switch(),
    },
    "precision": {
        "float32": switch(),
        "router in bfloat16": switch(router="switch_bfloat16"),
        "bfloat16, router in float32": switch(_BFLOAT16),
        "all in bfloat16": switch(_BFLOAT16, router="switch_bfloat16"),
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tables", nargs="*", choices=[*TABLES, []], help="which; all of them")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--before", type=int, default=1200, help="steps of the dense model")
    parser.add_argument("--steps", type=int, default=600, help="steps of every trial")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSONL of finished trials")
    options = parser.parse_args()
    registry.register("switch_bfloat16")(BFloat16SwitchRouter)
    documents = python_documents()
    done = {row["key"] for row in read(options.out)}
    with tempfile.TemporaryDirectory() as folder:
        worlds: dict[int, World] = {}
        for name in options.tables or TABLES:
            for seed in options.seeds:
                for label, trial in TABLES[name].items():
                    key = key_of(trial, seed, options.before, options.steps)
                    if key in done:
                        continue
                    if seed not in worlds:
                        worlds[seed] = World.made(seed, documents, Path(folder), options.before)
                    row = {"key": key, **worlds[seed].run(trial, options.steps)}
                    with options.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
                    done.add(key)
                    print(f"{name} {seed} {label}: {row['before']:.4f} -> {row['after']:.4f}")


def key_of(trial: Trial, seed: int, before: int, steps: int) -> str:
    """What decides a trial's numbers, as one line of JSON."""
    start = 0 if trial.scratch is not None else before
    facts = {"seed": seed, "before": start, "steps": steps, **asdict(trial)}
    return json.dumps(facts, sort_keys=True)


def read(path: Path) -> list[dict[str, Any]]:
    """Finished trials; a line that a kill cut off is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


@dataclass
class World:
    """What the trials of a seed share: text, batches, and the dense model, trained once."""

    seed: int
    material: Material
    before: int
    dense: nn.Module | None = None
    batches: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    @classmethod
    def made(cls, seed: int, documents: Any, folder: Path, before: int) -> World:
        vocabulary = folder / f"{seed}.model"
        sizes = {"vocab_size": SIZES["vocab_size"], "batch_size": BATCH_SIZE}
        return cls(seed, prepare(documents, vocabulary, **sizes, seed=seed), before)

    def run(self, trial: Trial, steps: int) -> dict[str, Any]:
        """Train a trial's model; what was measured. Seconds are of the processor, not of the wall:
        other programs on the machine do not count, and neither does evaluation.
        """
        model = self.model(trial)
        before = self.held_out(model)
        skip = self.before if trial.scratch is None else 0
        torch.manual_seed(self.seed)
        settings = TrainingRecipe(learning_rate=RATE, warmup=WARMUP).with_changes(**trial.training)
        records, curve = self.train(model, settings, steps, skip)
        return {
            "before": before,
            "after": curve[-1][2],
            "curve": curve,
            "dropped": mean_of(records, "dropped"),
            "first_violation": mean_of(records[:20], "max_violation"),
            "max_violation": mean_of(records[-50:], "max_violation"),
            "dead": mean_of(records[-50:], "dead"),
        }

    def train(
        self, model: nn.Module, settings: TrainingRecipe, steps: int, skip: int
    ) -> tuple[list[StepRecord], list[tuple[int, float, float]]]:
        """Train on; the records, and (step, seconds so far, held-out loss) at a few steps."""
        curve: list[tuple[int, float, float]] = []
        evaluating = 0.0
        began = time.process_time()

        def after(state: TrainingState, record: StepRecord) -> None:
            nonlocal evaluating
            if state.step % max(1, steps // POINTS) == 0 or state.step == steps:
                now = time.process_time()
                curve.append((state.step, now - began - evaluating, self.held_out(model)))
                evaluating += time.process_time() - now

        state = start(model, settings, steps=steps)
        batches = self.batches_from(skip)
        records = fit(state, batches, settings, steps=steps, on_step=after, nonfinite="skip")
        return records, curve

    def model(self, trial: Trial) -> nn.Module:
        """The model of a trial at its first step."""
        if trial.scratch is not None:
            config = moezoo.SwitchConfig(**{**SIZES, **PUBLISHED, **trial.scratch})
            model = moezoo.build(config, seed=self.seed)
            widen(model, trial.widen)
            return model
        dense = self.dense_model()
        if trial.upcycle is not None:
            sample = self.material.sample.splitlines()
            ids = [list(self.material.tokenizer.encode(line)) for line in sample]
            made = moezoo.upcycle(
                dense, **trial.upcycle, seed=self.seed, calibration=Calibration(ids)
            )
        else:
            made = moezoo.build(moezoo.SwitchConfig(**SIZES), seed=self.seed)
            made.load_state_dict(dense.state_dict())
        if trial.losses is not None:
            config: Any = made.config
            changed = moezoo.build(config.replace(router_losses=trial.losses), seed=self.seed)
            changed.load_state_dict(made.state_dict())
            made = changed
        return made

    def dense_model(self) -> nn.Module:
        if self.dense is None:
            self.dense = moezoo.build(moezoo.SwitchConfig(**SIZES), seed=self.seed)
            settings = TrainingRecipe(learning_rate=RATE, warmup=WARMUP)
            batches = self.batches_from(0)
            fit(start(self.dense, settings, steps=self.before), batches, settings,
                steps=self.before)  # fmt: skip
        return self.dense

    def batches_from(self, skip: int) -> Any:
        """The seed's batches from number `skip` on, each made once."""

        def batch(step: int) -> dict[str, Tensor]:
            number = skip + step
            if number not in self.batches:
                self.batches[number] = self.material.train(number)
            return self.batches[number]

        return batch

    def held_out(self, model: nn.Module) -> float:
        """Held-out cross entropy in nats per target token; NaN when it is not finite."""
        held = self.material.held_out
        count = min(HELD_OUT_BATCHES, held.batches_per_epoch)
        if -1 not in self.batches:
            self.batches.update({-1 - i: held(i) for i in range(count)})
        return evaluate(model, lambda i: self.batches[-1 - i], count=count)["cross_entropy"]


@torch.no_grad()
def widen(model: nn.Module, factor: float) -> None:
    """Multiply the variance of every attention and feed-forward matrix."""
    for name, parameter in model.named_parameters():
        if _MATRIX.search(name):
            parameter.mul_(math.sqrt(factor))


if __name__ == "__main__":
    main()
