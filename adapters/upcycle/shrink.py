"""A mixture with fewer experts: the least used ones are merged into their likes, or dropped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moezoo.adapters.checkpoint_source import CheckpointSource, open_checkpoint
from moezoo.adapters.families import DecoderConfig, Family, ModelConfig, layout_for
from moezoo.adapters.formats.base import tensor_bytes
from moezoo.adapters.names import expert_axis
from moezoo.adapters.tensor_files import TensorPlan
from moezoo.adapters.upcycle.downcycling import known_scale
from moezoo.adapters.upcycle.likeness import Group, distances, joined
from moezoo.adapters.upcycle.regating import shares, wo_factors
from moezoo.adapters.upcycle.rewrite import Output, rewrite
from moezoo.errors import ConfigError, did_you_mean
from moezoo.records import Assignment
from moezoo.traces import Trace

METHODS = ("merge", "prune")
Groups = Mapping[str, tuple[Group, ...]]  # by layer: the old experts of each new one
Factors = Mapping[str, list[float]]  # by layer: of each new one, on `wo`


def shrink(
    path: str | Path,
    out: str | Path,
    *,
    num_experts: int,
    trace: Trace | None = None,
    method: str = "merge",
    overwrite: bool = False,
) -> Path:
    """Reduce every sparse layer to `num_experts` experts.

    Args:
        trace: a recorded run; how many tokens an expert got is its weight in a merge, and decides
            which experts go in a prune. None: all weigh the same (merge only). Probabilities in it
            say how the router weighs real tokens (`traces.of(tape, probs=True)`).
        method: "merge" joins the two likest experts again and again, their weights and router rows
            averaged by use; "prune" keeps the most used ones.

    With fewer experts the router weighs those that remain in another way, which a factor on their
    `wo` makes up for (`regating.wo_factors`). Equal experts of equal rows merge exactly: shrinking
    what `grow` made to what it was, or a fresh upcycling to any number, gives the function back. A
    decoder that chose all twins of an expert then chooses the one that they have become.

    Raises ConfigError for a dense model, an unknown method, a trace of another model, or a router
    that chooses, or needs, more experts than remain.
    """
    if method not in METHODS:
        hint = did_you_mean(method, METHODS)
        raise ConfigError(f"unknown method {str(method)[:80]!r}", field="method", hint=hint)
    if method == "prune" and trace is None:
        hint = "Record one: `moezoo trace`, in Python moezoo.traces; it is passed as --trace."
        raise ConfigError("prune needs a routing trace", field="trace", hint=hint)
    with open_checkpoint(path) as checkpoint:
        config = checkpoint.config
        twins = joint = 1
        if isinstance(config, DecoderConfig) and method == "merge":
            twins = _twins(checkpoint.description.values.get("moezoo_provenance"))
            joint = _joint(config, twins, num_experts)
        layers = _sparse_layers(config, num_experts, joint)
        use = {layer: _use(trace, layer, config.num_experts) for layer in layers}
        groups = {
            layer: joined(distances(checkpoint, layer), num_experts)
            if method == "merge"
            else _kept(use[layer], num_experts)
            for layer in layers
        }
        factors = {
            layer: wo_factors(checkpoint, layer, made, use[layer], trace)
            for layer, made in groups.items()
        }
        mean = float(torch.tensor(list(factors.values()), dtype=torch.float64, device="cpu").mean())
        target = config.replace(
            num_experts=num_experts, wo_scale=_scale(known_scale(checkpoint), mean)
        )
        if isinstance(config, DecoderConfig):
            target = target.replace(choices=config.choices // joint)
        family = layout_for(target, dtypes=checkpoint.dtypes)
        operation: dict[str, Any] = {
            "operation": "shrink",
            "method": method,
            "groups": {layer: [list(group) for group in made] for layer, made in groups.items()},
            "wo_factors": factors,
        }
        if twins > joint:
            operation["twins"] = twins // joint
        return rewrite(
            checkpoint,
            out,
            list(_outputs(checkpoint, family, groups, use, factors)),
            config=target,
            family=family,
            operation=operation,
            overwrite=overwrite,
        )


def _scale(known: float | None, mean: float) -> float | None:
    return known if mean == 1.0 else (known or 1.0) * mean


def _twins(made: Any) -> int:
    """Of how many twins each expert is one, by the provenance of a decoder; 1 if none grew it."""
    if not isinstance(made, Mapping):
        return 1
    operation, sources = made.get("operation"), made.get("made_from")
    first = sources[0] if isinstance(sources, list) and sources else None
    before = first.get("provenance") if isinstance(first, Mapping) else None
    if operation == "export":
        return _twins(before)
    count = made.get("factor" if operation == "grow" else "twins", 1)
    count = count if type(count) is int and count > 0 else 1
    return count * _twins(before) if operation == "grow" else count


def _joint(config: DecoderConfig, twins: int, num_experts: int) -> int:
    """How many twins become one expert, so that a token which chose all of them chooses it."""
    joint, rest = divmod(config.num_experts, max(num_experts, 1))
    return 1 if rest or not joint or twins % joint or config.choices % joint else joint


def _sparse_layers(config: ModelConfig, num_experts: int, joint: int) -> list[str]:
    """Their names. Raises ConfigError where there is nothing to reduce to `num_experts`."""
    layers = [f"encoder.blocks.{i}.mlp" for i in config.encoder_sparse]
    layers += [f"decoder.blocks.{i}.mlp" for i in config.decoder_sparse]
    if not layers:
        raise ConfigError("the model is dense", field="source", hint="Use `moezoo upcycle`.")
    if not 1 <= num_experts < config.num_experts:
        raise ConfigError(
            "num_experts must be fewer than the model has",
            field="num_experts",
            expected=f"1 to {config.num_experts - 1}",
            found=num_experts,
        )
    if isinstance(config, DecoderConfig) and num_experts < (choices := config.choices // joint):
        raise ConfigError(
            f"every token goes to {choices} experts", field="num_experts",
            expected=f">= {choices}", found=num_experts, hint="Keep as many.",
        )  # fmt: skip
    if isinstance(config, DecoderConfig) and config.sparse_kind is not None:
        config.sparse_kind.check_number(num_experts)
    return layers


def _use(trace: Trace | None, layer: str, num_experts: int) -> Tensor:
    """Tokens that each expert got, (E,); at least one each, so that averages stay defined."""
    if trace is None:
        return torch.ones(num_experts, device="cpu")
    if layer not in trace.by_layer:
        raise ConfigError(
            f"the trace has no layer {layer!r}",
            field="trace",
            hint=did_you_mean(layer, list(trace.by_layer)),
        )
    counts = torch.zeros(num_experts, device="cpu")
    for call in trace.by_layer[layer]:
        pairs = call.assignment
        if not isinstance(pairs, Assignment) or pairs.num_experts != num_experts:
            raise ConfigError("the trace is of another model", field="trace", key=layer)
        counts += torch.bincount(pairs.expert[pairs.kept], minlength=num_experts)
    return counts.clamp(min=1)


def _kept(use: Tensor, count: int) -> tuple[Group, ...]:
    best = use.argsort(descending=True, stable=True)[:count].sort().values
    return tuple((int(expert),) for expert in best)


def _outputs(
    checkpoint: CheckpointSource,
    family: Family,
    groups: Groups,
    use: Mapping[str, Tensor],
    factors: Factors,
) -> Iterator[Output]:
    for name, parts in checkpoint.tensors.items():
        layer = name.rpartition(".mlp.")[0] + ".mlp"
        made = groups.get(layer, ())
        names = family.disk_names(name, num_experts=len(made) or 1)
        if ".mlp.experts." in name:
            for target, group, wo in zip(names, made, factors[layer], strict=True):
                factor = wo if name.endswith(".wo") else 1.0
                plan = TensorPlan(target, parts[0].dtype, parts[0].shape)
                if len(group) == 1:
                    yield Output(plan, parts[group[0]], factor)
                else:
                    average = partial(_average, checkpoint, name, group, use[layer], factor)
                    yield Output(plan, make=average)
        elif ".mlp.router.classifier." in name:
            sizes = list(parts[0].shape)
            sizes[expert_axis(name)] = len(made)
            plan = TensorPlan(names[0], parts[0].dtype, tuple(sizes))
            yield Output(plan, make=partial(_rows, checkpoint, name, made, use[layer]))
        else:
            yield Output(TensorPlan(names[0], parts[0].dtype, parts[0].shape), parts[0])


def _average(
    checkpoint: CheckpointSource, name: str, group: Group, use: Tensor, factor: float
) -> memoryview:
    first = checkpoint.source.tensor(checkpoint.tensors[name][group[0]].name)
    total = torch.zeros_like(first, dtype=torch.float64)
    for expert, share in zip(group, shares(group, use).tolist(), strict=True):
        total += checkpoint.source.tensor(checkpoint.tensors[name][expert].name).double() * share
    return tensor_bytes((total * factor).to(first.dtype))


def _rows(
    checkpoint: CheckpointSource, name: str, groups: Sequence[Group], use: Tensor
) -> memoryview:
    (info,) = checkpoint.tensors[name]
    rows = checkpoint.source.tensor(info.name).transpose(0, expert_axis(name))
    merged = []
    for group in groups:
        part = shares(group, use).view(-1, *[1] * (rows.dim() - 1))
        merged.append((rows[list(group)].double() * part).sum(0))
    made = torch.stack(merged)
    if name.endswith(".correction"):
        made = made * (len(rows) / len(groups))  # it is added to probabilities, which grow as much
    made = made.to(rows.dtype)
    return tensor_bytes(made.transpose(0, expert_axis(name)).contiguous())
