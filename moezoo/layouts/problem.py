"""What a layout is sought for, and the figures of each one that is possible. Imports no torch for
plain models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from moezoo.config import SwitchConfig
from moezoo.cost import Cost, cost
from moezoo.layouts.activations import Batch, Kept, activations
from moezoo.layouts.figures import Layout, Memory, Time, Wire
from moezoo.layouts.machine import Machine
from moezoo.layouts.shapes import Parameters, count, on_rank, parameters

# Bytes per parameter: held (weight and gradient in float32, state), and moved in a step.
OPTIMIZERS = {"adam": (16, 28), "adamw": (16, 28), "adafactor": (8, 24)}
_HALF, _FULL = 2, 4
_MOST_GPUS = 2**17


@dataclass(frozen=True)
class Problem:
    """What a layout is sought for."""

    name: str
    config: SwitchConfig
    memory: int
    optimizer: str
    tokens: int
    length: int
    task: str
    recompute: bool
    masked: bool
    machine: Machine

    @cached_property
    def parameters(self) -> Parameters:
        return parameters(self.config, task=self.task, length=self.length)

    @cached_property
    def cost(self) -> Cost:
        return cost(self.config, task=self.task, length=self.length)

    @cached_property
    def activations(self) -> Kept:
        batch = Batch(self.tokens, self.length, self.masked)
        layer = self.parameters.layer
        return activations(self.config, layer, batch, task=self.task, recompute=self.recompute)

    @property
    def limit(self) -> int:
        return int(self.memory * self.machine.usable)

    def layout(self, gpus: int, ep: int, dense_over: int) -> Layout:
        """The figures of one layout that is possible."""
        experts = self.parameters.expert_parameters(gpus, ep, dense_over)
        dense = on_rank(self.parameters.dense, dense_over, 0)
        held, moved = OPTIMIZERS[self.optimizer]
        kept, rows = self.activations, self.rows(ep)
        memory = Memory(
            experts=held * experts,
            dense=held * dense,
            copies=self.copies(gpus, ep, dense_over),
            activations=kept.kept,
            peak=max(kept.logits, kept.block),
            exchange=2 * rows if ep > 1 else 0,
            context=self.machine.context,
        )
        passes = 2 * (3 if self.recompute else 2) * sum(self.parameters.sparse)
        wire, gathers = self.gathers(gpus, ep, dense_over)
        time = Time(
            compute=self.flops / self.machine.flops,
            gathers=gathers,
            rows=passes * self.machine.exchange(rows, ep),
            optimizer=moved * (experts + dense) / self.machine.bandwidth,
        )
        wire = replace(wire, rows=passes * rows * (ep - 1) // ep)
        return Layout(
            self.name, gpus, ep, dense_over, memory, self.limit, wire, time, experts,
            parameters=self.parameters,
        )  # fmt: skip

    def rows(self, ep: int) -> int:
        """Bytes of the rows that a rank's tokens are in a layer."""
        return round(self.tokens * self.parameters.layer.rows * _HALF * self.config.d_model)

    @property
    def flops(self) -> int:
        """Of a rank's step: forward, twice as much backward, and blocks once more."""
        forward = self.cost.flops_per_token * self.tokens
        if not self.recompute:
            return 3 * forward
        head = self.config.vocab_size * self.config.d_model
        once = 2 * head * self.tokens if self.task == "conditional_generation" else 0
        return 4 * forward - once

    def blocks(self, ep: int) -> list[tuple[int, int]]:
        """Dense and expert parameters of each block, as gathered."""
        experts = count(self.parameters.experts) // ep
        pairs = zip(self.parameters.blocks, self.parameters.sparse, strict=True)
        return [(count(shapes), experts * sparse) for shapes, sparse in pairs]

    def copies(self, gpus: int, ep: int, dense_over: int) -> int:
        """Two blocks and the root in half precision, the gradients of a block and of the root,
        and what is reduced of them, in float32.
        """
        root, blocks = count(self.parameters.root), self.blocks(ep)
        sizes = [dense + experts for dense, experts in blocks]
        two = max(map(sum, zip(sizes, [*sizes[1:], 0], strict=True)))
        over = dense_over if ep == 1 else gpus // ep
        reduced = [d * (dense_over > 1) + e * (over > 1) for d, e in [*blocks, (root, 0)]]
        return _HALF * (two + 2 * root + max(sizes)) + _FULL * max(reduced)

    def gathers(self, gpus: int, ep: int, dense_over: int) -> tuple[Wire, float]:
        """Bytes that a rank sends of weights (twice, the root once) and gradients, and seconds."""
        machine, root = self.machine, count(self.parameters.root)
        wire, seconds = {"dense": 0.0, "experts": 0.0}, 0.0
        dense_near = min(dense_over, machine.node)
        # The ranks that share a rank's experts are `ep` apart; with ep 1 they lie as all else.
        over = dense_over if ep == 1 else gpus // ep
        near = dense_near if ep == 1 else min(over, max(machine.node // ep, 1))
        units = [(root, 0, 1), *((d, e, 2) for d, e in self.blocks(ep))]
        for dense, experts, times in units:
            for name, size, ranks, together, replicas in (
                ("dense", dense, dense_over, dense_near, gpus // dense_over),
                ("experts", experts, over, near, gpus // (over * ep)),
            ):
                if size == 0:
                    continue
                wire[name] += size * (times * _HALF + _FULL) * (ranks - 1) / ranks
                seconds += times * machine.gather(_HALF * size, ranks, together)
                seconds += machine.gather(_FULL * size, ranks, together)
                # The sum over replicas: reduced, and gathered again.
                part = _FULL * size / ranks
                wire[name] += 2 * part * (replicas - 1) / replicas
                seconds += 2 * machine.gather(part, replicas, 1)
        return Wire(0, int(wire["dense"]), int(wire["experts"])), seconds

    def candidates(self, gpus: int) -> Iterator[Layout]:
        """Every layout of so many GPUs."""
        for ep in range(1, math.gcd(gpus, self.config.num_experts or 1) + 1):
            if self.refusal(gpus, ep) is None:
                for dense_over in sorted({gpus, min(gpus, self.machine.node)}):
                    yield self.layout(gpus, ep, dense_over)

    def refusal(self, gpus: int, ep: int) -> str | None:
        """Why experts cannot lie over `ep` of `gpus` ranks."""
        config, experts = self.config, self.parameters.experts
        if gpus > self.machine.node and gpus % self.machine.node:
            return f"beyond a node of {self.machine.node}, GPUs come in whole nodes"
        if gpus % ep:
            return f"ep {ep} does not divide {gpus} GPUs"
        if ep > 1 and not experts:
            if not any(self.parameters.sparse):
                return "there are no experts to divide among ranks"
            return f"experts of the kind {config.experts!r} cannot be divided among ranks"
        if ep == 1:
            return None
        number, *widths = experts[0]
        if number % ep:
            return f"ep {ep} does not divide {number} experts"
        if all(width % (gpus // ep) for width in widths):
            return f"dp {gpus // ep} divides neither width of an expert"
        return None

    def fewest(self) -> int | None:
        """The smallest power of two of GPUs that some layout fits."""
        gpus = 1
        while gpus <= _MOST_GPUS:
            if any(layout.fits for layout in self.candidates(gpus)):
                return gpus
            gpus *= 2
        return None
