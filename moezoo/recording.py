"""Recording: what every sparse layer of a model did while a `with` block ran. Read-only.

Layers of other libraries are seen by what an adapter reads them with (`register_reader`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.distributed.device_mesh import DeviceMesh

from moezoo import losses as router_losses
from moezoo.config import SwitchConfig
from moezoo.errors import ConfigError, NonFiniteInput, RoutingError
from moezoo.functional.statistics import LayerStats, read_stats, sum_of
from moezoo.layer import MoE
from moezoo.losses.base import RouterLoss
from moezoo.ops.observed import is_compiled
from moezoo.pairing import fed_losses, loss_refusal
from moezoo.private_torch import is_in_backward
from moezoo.records import Routing
from moezoo.routers.base import Router


class Handle(Protocol):
    """What takes a hook away again."""

    def remove(self) -> None: ...


class Watched(Protocol):
    """A sparse layer of another library, as its adapter reads it."""

    @property
    def router(self) -> Router:
        """What its router is by our words: its sizes and what it gives. Its parameters are those of
        the router that is read; `adapt` leaves them alone.
        """

    def watch(self, seen: Callable[[Routing], None], *, checked: bool) -> Iterable[Handle]:
        """Call `seen` with the routing of every call until the handles are removed; `checked` as
        for `record`.
        """


Reader = Callable[[nn.Module], Mapping[str, Watched]]
_READERS: list[Reader] = []


def register_reader(reader: Reader) -> None:
    """Let `record` see the sparse layers that `reader` finds in a model, by their module names."""
    if reader not in _READERS:
        _READERS.append(reader)


@dataclass(frozen=True)
class Tape:
    """The routings of a block, by the layer's module name, in call order."""

    layers: Mapping[str, MoE | Watched]
    by_layer: dict[str, list[Routing]] = field(default_factory=dict)
    compiled: frozenset[str] = frozenset()
    configured: Mapping[str, Any] | None = None

    def check(self) -> Tape:
        """Itself. Raises RoutingError when nothing was recorded, or nothing of a compiled layer,
        whose loss would be 0 without a gradient.
        """
        missing = sorted(self.compiled - self.by_layer.keys())
        if missing:
            hint = "Record the model before it is compiled, or compile other parts of it."
            reason = f"layer {missing[0]!r} is compiled: its calls were not seen"
            raise RoutingError(reason, hint=hint)
        if not self.by_layer:
            hint = "Call the model inside the block, in the thread that opened it."
            raise RoutingError("nothing was recorded", hint=hint)
        return self

    def loss(self, weights: Mapping[str, float] | None = None) -> Tensor:
        """The weighted sum of router losses, each averaged over all recorded calls.

        Args:
            weights: coefficient by loss name, such as `{"load_balance": 0.01, "z": 0.001}`; None:
                the configured ones: `router_losses` of a moezoo model's config, else each router's
                `default_losses`, which are those of its paper.

        Raises RegistryError for an unknown loss, ConfigError for one that a router cannot feed,
        RoutingError when nothing was recorded, or when the routing has no gradient although the
        router wants one (reentrant activation checkpointing, or a block run under no_grad).
        """
        self.check()._check_gradient()
        if weights is None:
            return self._configured_loss()
        if not isinstance(weights, Mapping):
            hint = (
                "Such as tape.loss({'load_balance': 0.01}); tape.loss() takes the configured ones."
            )
            reason = "weights are by the name of a loss"
            raise ConfigError(reason, field="weights", found=repr(weights), hint=hint)
        total = torch.zeros((), device="cpu")
        for name, weight in weights.items():
            values = self._values(name)
            if values:
                total = weight * torch.stack(values).mean() + total.to(values[0].device)
        return total

    def losses(self, name: str) -> dict[str, Tensor]:
        """One router loss per layer, averaged over the layer's calls, unweighted."""
        loss = router_losses.build(name)
        found = {}
        for layer, routings in self.check().by_layer.items():
            self._check_loss(layer, loss, name)
            found[layer] = torch.stack([loss(routing) for routing in routings]).mean()
        return found

    def stats(self, mesh: DeviceMesh | None = None) -> dict[str, LayerStats]:
        """Statistics by layer (see `LayerStats`). Synchronises with the device.

        Args:
            mesh: sum over all ranks of a mesh, each of which must call it; a rank that recorded
                nothing of a layer adds nothing. None: of this rank alone.

        Raises RoutingError when nothing was recorded, on no rank of the mesh.
        """
        if mesh is None:
            sums = [sum_of(routings) for routings in self.check().by_layer.values()]
            return dict(zip(self.by_layer, read_stats(sums), strict=True))
        own = [self._sums(name, mesh.device_type) for name in self.layers]
        total = torch.cat(own)
        for dimension in range(mesh.ndim):
            torch.distributed.all_reduce(total, group=mesh.get_group(dimension))
        parts = zip(self.layers, torch.split(total, [len(part) for part in own]), strict=True)
        found = {name: part[1:] for name, part in parts if part[0] > 0}
        if not found:
            self.check()
        return dict(zip(found, read_stats(list(found.values())), strict=True))

    def _sums(self, name: str, device_type: str) -> Tensor:
        """How many calls of a layer were recorded, and what they add up to."""
        routings = self.by_layer.get(name)
        if not routings:
            size = 1 + 4 + 2 * self.layers[name].router.num_experts  # see `sum_of`
            return torch.zeros(size, dtype=torch.float64, device=device_type)
        sums = sum_of(routings)
        return torch.cat((sums.new_full((1,), len(routings)), sums))

    def adapt(self) -> None:
        """Let every router adapt what no gradient trains (balancing biases, thresholds, sparsity
        coefficients) to the recorded routings: once per optimizer step, after it.
        """
        for name, routings in self.check().by_layer.items():
            self.layers[name].router.adapt(routings)

    def _configured_loss(self) -> Tensor:
        weighted: dict[str, list[Tensor]] = {}
        for layer, routings in self.by_layer.items():
            losses = fed_losses(self.layers[layer].router, self.configured)
            for name, (loss, weight) in losses.items():
                if weight:
                    weighted.setdefault(name, []).extend(weight * loss(r) for r in routings)
        means = [torch.stack(values).mean() for values in weighted.values()]
        return torch.stack(means).sum() if means else torch.zeros((), device="cpu")

    def _values(self, name: str) -> list[Tensor]:
        loss = router_losses.build(name)
        values = []
        for layer, routings in self.by_layer.items():
            self._check_loss(layer, loss, name)
            values += [loss(routing) for routing in routings]
        return values

    def _check_loss(self, layer: str, loss: RouterLoss, name: str) -> None:
        reason = loss_refusal(self.layers[layer].router, loss, name)
        if reason:
            raise ConfigError(f"layer {layer!r}: {reason}", field=name)

    def _check_gradient(self) -> None:
        if not torch.is_grad_enabled():
            return
        for name, routings in self.by_layer.items():
            wants = any(p.requires_grad for p in self.layers[name].router.parameters())
            if wants and any(_lacks_gradient(routing) for routing in routings):
                reason = (
                    f"the routing of layer {name!r} has no gradient: its loss would train nothing"
                )
                raise RoutingError(reason, hint=_NO_GRADIENT)


_NO_GRADIENT = (
    "Reentrant activation checkpointing does this: pass use_reentrant=False; "
    "or take the loss under torch.no_grad()."
)


def _lacks_gradient(routing: Routing) -> bool:
    scores = routing.probs if routing.logits is None else routing.logits
    return scores is not None and not scores.requires_grad


@contextmanager
def record(model: nn.Module, *, checked: bool = False) -> Iterator[Tape]:
    """Record the routing of every `MoE` inside `model` while the block runs, and of the sparse
    layers of other libraries that an adapter reads (transformers' once `moezoo.adapters.hf` is
    imported, which `moezoo.record` does where transformers is).

    Calls of these very modules are recorded, in the thread that opened the block: not those of a
    copy, not those of another thread. Recomputation under activation checkpointing is not recorded
    a second time.

    Args:
        model: any module that holds such layers (`SparseMLP` holds an `MoE`).
        checked: raise NonFiniteInput, naming layer and position, for NaN or infinity in a layer's
            input. Synchronises with the device.

    Raises ConfigError when the model has no sparse layer.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoE)}
    foreign = {name: layer for reader in _READERS for name, layer in reader(model).items()}
    if not layers and not foreign:
        raise ConfigError(f"{type(model).__name__} has no MoE layer to record", field="model")
    config = getattr(model, "config", None)
    configured = config.router_losses if isinstance(config, SwitchConfig) else None
    every: dict[str, MoE | Watched] = {**layers, **foreign}
    tape = Tape(every, compiled=_compiled(model, every), configured=configured)
    handles: list[Handle] = []
    for name, watched in foreign.items():
        handles += watched.watch(_keeper(tape, name), checked=checked)
    for name, layer in layers.items():
        handles.append(layer.register_forward_hook(_recorder(tape, name, layer)))
        if checked:
            handles.append(layer.register_forward_pre_hook(_checker(name, layer)))
    try:
        yield tape
    finally:
        for handle in handles:
            handle.remove()


def _compiled(model: nn.Module, layers: Iterable[str]) -> frozenset[str]:
    """The names of layers that are compiled, or inside a module that is."""
    found = [f"{name}." for name, module in model.named_modules() if is_compiled(module)]
    return frozenset(n for n in layers if any(f"{n}.".startswith(o.lstrip(".")) for o in found))


def _recorder(tape: Tape, name: str, layer: MoE) -> Callable[..., None]:
    keep = _keeper(tape, name)

    def hook(module: nn.Module, inputs: object, output: tuple[Tensor, Routing]) -> None:
        if module is layer:  # and not a copy, hooks and all
            keep(output[1])

    return hook


def _keeper(tape: Tape, name: str) -> Callable[[Routing], None]:
    thread = threading.get_ident()

    def keep(routing: Routing) -> None:
        if not (is_compiling() or threading.get_ident() == thread):
            return
        # Inside backward this is the recomputation of a checkpointed block, seen before.
        if not is_in_backward():
            tape.by_layer.setdefault(name, []).append(routing)

    return keep


def _checker(name: str, layer: MoE) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if module is not layer:  # a copy, hooks and all
            return
        x = inputs[0]
        bad = ~torch.isfinite(x).all(-1)
        if bool(bad.any()):
            position = bad.nonzero()[0].tolist()
            raise NonFiniteInput(
                f"layer {name!r} got NaN or infinity at position {position}", field="x"
            )

    return hook
