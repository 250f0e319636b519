"""What a report is made from: a trace of the routings, the ids of its tokens, and the policies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moezoo import traces
from moezoo.capacity.base import CapacityPolicy
from moezoo.layer import MoE
from moezoo.models.feed_forward import DenseMLP
from moezoo.models.stack import Stack
from moezoo.recording import record
from moezoo.records import Assignment, Routing, Tokens
from moezoo.traces import Trace

Batch = Mapping[str, Tensor]
Ids = Mapping[str, tuple[Tensor | None, ...]]


@dataclass(frozen=True)
class Observation:
    """What a model's layers did on some batches. Whoever has a trace can make one: no model is
    needed from here on.

    Fields: trace; ids, for each of its layers the ids (T,) of every call's tokens, None where they
    are not known; policies, the capacity policy of a layer, to be replayed at other factors (the
    paper's where none is given); dense, the layers are those of a dense model, each one expert;
    ours, the model is moezoo's and not of transformers.
    """

    trace: Trace
    ids: Ids = field(default_factory=dict)
    policies: Mapping[str, CapacityPolicy] = field(default_factory=dict)
    dense: bool = False
    ours: bool = True


@torch.no_grad()
def observe(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    on_output: Callable[[Batch, Any], None] | None = None,
) -> Observation:
    """Run a model over batches, in evaluation, and keep what its layers did. The model is left in
    the mode that it was in.

    Args:
        on_output: called with each batch and what the model made of it.

    Raises ConfigError for a model with neither sparse layers nor MLPs of this package, RoutingError
    when nothing ran.
    """
    was_training = model.training
    model.eval()
    dense = not any(isinstance(module, MoE) for module in model.modules())
    watched = _dense(model) if dense and _mlps(model) else _sparse(model)
    try:
        with watched as finish:
            for batch in batches:
                output = model(**batch)
                if on_output is not None:
                    on_output(batch, output)
            return finish()
    finally:
        model.train(was_training)


@contextmanager
def _sparse(model: nn.Module) -> Iterator[Callable[[], Observation]]:
    """Records every sparse layer, and the ids that its router was given, or the batch was."""
    inputs: list[dict[str, Tensor]] = []
    with record(model) as tape:
        ours = {name: layer for name, layer in tape.layers.items() if isinstance(layer, MoE)}
        ids: dict[str, list[Tensor | None]] = {name: [] for name in ours}

        def keep(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, given: tuple[Tokens, ...]) -> None:
                found = given[0].ids
                ids[name].append(found if found is not None else _fitting(inputs, given[0]))

            return hook

        def note(_: nn.Module, given: Any, named: dict[str, Any]) -> None:
            inputs[:] = [{k: v for k, v in named.items() if isinstance(v, Tensor)}]

        handles = [
            layer.router.register_forward_pre_hook(keep(name)) for name, layer in ours.items()
        ]
        handles.append(model.register_forward_pre_hook(note, with_kwargs=True))
        try:
            yield lambda: Observation(
                traces.of(tape, probs=True),
                {name: tuple(ids[name]) for name in tape.by_layer if name in ids},
                {name: ours[name].capacity for name in tape.by_layer if name in ours},
            )
        finally:
            for handle in handles:
                handle.remove()


def _fitting(inputs: list[dict[str, Tensor]], tokens: Tokens) -> Tensor | None:
    """The ids of the batch where the layer got one token for each, as in a model of others."""
    ids = inputs[0].get("input_ids") if inputs else None
    return ids.reshape(-1) if ids is not None and ids.numel() == tokens.num_tokens else None


@contextmanager
def _dense(model: nn.Module) -> Iterator[Callable[[], Observation]]:
    """Records every MLP of a dense model as a layer with one expert, which takes every token."""
    calls: dict[str, list[Routing]] = {}
    ids: dict[str, list[Tensor | None]] = {}
    handles: list[Any] = []
    for prefix, stack in model.named_modules():
        if not isinstance(stack, Stack):
            continue
        given: dict[str, Any] = {}

        def note(_: nn.Module, places: Any, named: dict[str, Any], given: Any = given) -> None:
            given.clear()
            given.update(named)
            given["routed"] = named.get("routed", places[1] if len(places) > 1 else None)

        handles.append(stack.register_forward_pre_hook(note, with_kwargs=True))
        for name, mlp in _mlps(stack).items():

            def keep(
                _: nn.Module, inputs: Any, out: Tensor, name: str = f"{prefix}.{name}",
                given: Any = given,
            ) -> None:  # fmt: skip
                calls.setdefault(name, []).append(_all_to_one(inputs[0], given.get("routed")))
                found = given.get("token_ids")
                ids.setdefault(name, []).append(None if found is None else found.reshape(-1))

            handles.append(mlp.register_forward_hook(keep))
    try:
        yield lambda: Observation(
            Trace({name: tuple(found) for name, found in calls.items()}),
            {name: tuple(found) for name, found in ids.items()},
            dense=True,
        )
    finally:
        for handle in handles:
            handle.remove()


def _mlps(model: nn.Module) -> dict[str, DenseMLP]:
    return {name: part for name, part in model.named_modules() if isinstance(part, DenseMLP)}


def _all_to_one(x: Tensor, routed: Tensor | None) -> Routing:
    """The routing of a layer with one expert for tokens x (..., L, D)."""
    count, length = x.numel() // x.shape[-1], x.shape[-2]
    real_T = None if routed is None else routed.reshape(-1).bool().cpu()
    kept = torch.ones(count, dtype=torch.bool) if real_T is None else real_T
    token = torch.arange(count)
    pairs = Assignment(
        token, torch.zeros_like(token), torch.ones(count), kept, count, 1, count, choices=1
    )
    return Routing(pairs, real=real_T, sequence_length=length)


def real_tokens(call: Routing) -> Tensor:
    """Which tokens (T,) of a call are no padding."""
    if call.real is not None:
        return call.real
    a = call.assignment
    count = a.num_tokens if isinstance(a, Assignment) else a.dispatch.shape[:2].numel()
    return torch.ones(count, dtype=torch.bool, device="cpu")
