"""Routing traces: what a recorded block routed where, to save, replay, compare and question.

In short::

    with moezoo.record(model) as tape:
        model(...)
    trace = traces.of(tape)
    trace.save("run.safetensors")
    with traces.replay(model, traces.load("run.safetensors")):
        model(...)                                  # the same pairs, whatever the router thinks
    traces.dropped(trace, FirstCome(factor=1.0))    # without running the model again
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from moezoo.capacity.base import CapacityPolicy
from moezoo.errors import ConfigError, CorruptFile, RoutingError, SaveError
from moezoo.layer import MoE
from moezoo.recording import Tape
from moezoo.records import Assignment, Routing, SoftAssignment
from moezoo.traces.calls import flattened, moved, num_tokens, restored
from moezoo.traces.players import LivePlayer, Player

_FORMAT = "moezoo.trace.1"


@dataclass(frozen=True)
class Trace:
    """The routings of every sparse layer, in call order: detached, on the CPU.

    Fields: by_layer, the module name to its calls. A call keeps both assignments (as proposed and
    as admitted), which tokens were real, and, when asked for, the probabilities; no logits, no
    losses.
    """

    by_layer: Mapping[str, tuple[Routing, ...]]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all. Raises SaveError."""
        tensors: dict[str, Tensor] = {}
        plain: dict[str, list[dict[str, Any]]] = {}
        for layer, calls in self.by_layer.items():
            plain[layer] = []
            for number, call in enumerate(calls):
                found, values = flattened(call)
                plain[layer].append(values)
                tensors |= {f"{layer}/{number}/{name}": value for name, value in found.items()}
        target = Path(path)
        beside = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            beside.write_bytes(to_bytes(tensors, {"format": _FORMAT, "calls": json.dumps(plain)}))
            os.replace(beside, target)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise SaveError(f"the trace was not written: {error}", path=target) from None


def of(tape: Tape, *, probs: bool = False) -> Trace:
    """The trace of a tape; `probs` keeps the probabilities (T, E), which `reroute` needs."""
    return Trace(
        {
            layer: tuple(moved(_stripped(call, probs), "cpu") for call in calls)
            for layer, calls in tape.check().by_layer.items()
        }
    )


def load(path: str | os.PathLike[str]) -> Trace:
    """Read a saved trace and check its records. Raises CorruptFile."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise CorruptFile(f"no readable trace: {error}", path=path) from None
    if about.get("format") != _FORMAT:
        wanted, found = _FORMAT, about.get("format")
        raise CorruptFile("not a trace", path=path, key="format", expected=wanted, found=found)
    try:
        plain = json.loads(about["calls"])
        by_layer = {
            layer: tuple(
                restored(tensors, f"{layer}/{number}/", values)
                for number, values in enumerate(calls)
            )
            for layer, calls in plain.items()
        }
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, RoutingError) as error:
        raise CorruptFile(f"a malformed trace: {error!r}", path=path) from None
    return Trace(by_layer)


@contextmanager
def replay(
    model: nn.Module, trace: Trace, *, weights: Literal["recorded", "live"] = "recorded"
) -> Iterator[None]:
    """Force the recorded assignments on every call inside the block.

    Routers still run, so logits, probabilities and losses are those of the model as it is now. With
    activation checkpointing, run backward inside the block too.

    Args:
        weights: "recorded": of the pairs too, so experts' outputs do not depend on the routers,
            which learn from the losses alone. "live": what the routers, as they are now, give the
            recorded pairs, with their gradients, as training after a rollout wants it.

    Raises ConfigError when the trace does not fit the model's layers, or for live weights of a
    router that gives none to pairs that it has not chosen; RoutingError when a call has another
    number of tokens than recorded, or when there are more or fewer calls.
    """
    if weights not in ("recorded", "live"):
        allowed = "'recorded' or 'live'"
        raise ConfigError("unknown weights", field="weights", expected=allowed, found=repr(weights))
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoE)}
    if set(layers) != set(trace.by_layer):
        wanted, found = sorted(layers), sorted(trace.by_layer)
        reason = "the trace is of another model"
        raise ConfigError(reason, field="trace", expected=wanted, found=found)
    for name, layer in layers.items():
        _check_experts(name, layer, trace.by_layer[name])
        if weights == "live" and not layer.router.takes_given:
            kind = type(layer.router).__name__
            reason = f"layer {name!r}: {kind} has no weights for pairs that it did not choose"
            hint = "Replay with weights='recorded'."
            raise ConfigError(reason, field="weights", hint=hint)
    made = LivePlayer if weights == "live" else Player
    players = {name: made(name, layer, trace.by_layer[name]) for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.__dict__["route"] = players[name]  # hides the method until the block ends
        yield
    finally:
        for layer in layers.values():
            del layer.__dict__["route"]
    for player in players.values():
        player.check_finished()


def _check_experts(name: str, layer: MoE, calls: tuple[Routing, ...]) -> None:
    for call in calls:
        wanted, found = layer.router.num_experts, call.assignment.num_experts
        if wanted != found:
            reason = f"the trace of layer {name!r} is of another number of experts"
            raise ConfigError(reason, field="trace", expected=wanted, found=found)


@dataclass(frozen=True)
class Difference:
    """How two traces of one layer differ.

    tokens: compared, over all calls. agreement: the share of them with the same kept experts.
    first: (call, token) of the first that differs, None when none does. weight: the largest
    difference of the weights of pairs that both kept (or of the entries of soft assignments).
    """

    tokens: int
    agreement: float
    first: tuple[int, int] | None
    weight: float


def compare(one: Trace, other: Trace) -> dict[str, Difference]:
    """The difference of every layer. Raises ConfigError for traces of other layers or lengths."""
    for wanted, found in (
        (sorted(one.by_layer), sorted(other.by_layer)),
        (_sizes(one), _sizes(other)),
    ):
        if wanted != found:
            reason = "the traces are not of the same input"
            raise ConfigError(reason, field="trace", expected=wanted, found=found)
    return {
        layer: _difference(calls, other.by_layer[layer]) for layer, calls in one.by_layer.items()
    }


def dropped(trace: Trace, policy: CapacityPolicy) -> dict[str, float]:
    """The share of proposed pairs that `policy`, in its current mode, would have dropped, by layer.

    The trace must hold probabilities (`of(tape, probs=True)`) for policies that move pairs. Raises
    ConfigError for those without, and for soft routing.
    """
    shares = {}
    for layer, calls in trace.by_layer.items():
        offered = kept = 0
        for call in calls:
            if isinstance(call.offered, SoftAssignment):
                raise ConfigError(
                    f"layer {layer!r} routes softly: nothing is dropped", field="trace"
                )
            if policy.moves and call.probs is None:
                hint = "Take the trace with of(tape, probs=True)."
                reason = f"{type(policy).__name__} needs probabilities"
                raise ConfigError(reason, field="trace", hint=hint)
            offered += int(call.offered.kept.sum())
            kept += int(policy(replace(call, assignment=call.offered, proposed=None)).kept.sum())
        shares[layer] = 1.0 - kept / offered if offered else 0.0
    return shares


def _stripped(call: Routing, probs: bool) -> Routing:
    return replace(call, logits=None, losses={}, probs=call.probs if probs else None)


def _sizes(trace: Trace) -> dict[str, list[int]]:
    return {layer: [num_tokens(call) for call in calls] for layer, calls in trace.by_layer.items()}


def _difference(ones: tuple[Routing, ...], others: tuple[Routing, ...]) -> Difference:
    tokens = equal = 0
    first, weight = None, 0.0
    for number, (one, other) in enumerate(zip(ones, others, strict=True)):
        differs_T, largest = _call_difference(one.assignment, other.assignment)
        tokens += differs_T.shape[0]
        equal += int((~differs_T).sum())
        weight = max(weight, largest)
        if first is None and bool(differs_T.any()):
            first = (number, int(differs_T.nonzero()[0, 0]))
    return Difference(tokens, equal / tokens if tokens else 1.0, first, weight)


def _call_difference(
    one: Assignment | SoftAssignment, other: Assignment | SoftAssignment
) -> tuple[Tensor, float]:
    """Which tokens (T,) have other experts, and the largest difference of common weights."""
    if isinstance(one, SoftAssignment) or isinstance(other, SoftAssignment):
        if not (isinstance(one, SoftAssignment) and isinstance(other, SoftAssignment)):
            raise ConfigError("one trace routes softly, the other does not", field="trace")
        gap = torch.maximum(
            (one.dispatch - other.dispatch).abs(), (one.combine - other.combine).abs()
        )
        differs_T = (gap > 0).flatten(2).any(-1).flatten()
        return differs_T, float(gap.max()) if gap.numel() else 0.0
    experts = max(one.num_experts, other.num_experts)
    dense = []
    for a in (one, other):
        flat = a.weight.new_full((a.num_tokens * experts,), -1.0)
        key_N = (a.token * experts + a.expert)[a.kept]
        dense.append(flat.index_copy(0, key_N, a.weight[a.kept]).view(a.num_tokens, experts))
    mine_TE, theirs_TE = dense[0] >= 0, dense[1] >= 0
    gap_TE = torch.where(mine_TE & theirs_TE, (dense[0] - dense[1]).abs(), 0.0)
    return (mine_TE != theirs_TE).any(-1), float(gap_TE.max()) if gap_TE.numel() else 0.0
