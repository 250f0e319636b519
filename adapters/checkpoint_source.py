"""An opened checkpoint whose every tensor is accounted for, from headers and config.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from moezoo.adapters.decoder_description import describe_decoder
from moezoo.adapters.description import Description, describe
from moezoo.adapters.families import DecoderConfig, ModelConfig
from moezoo.adapters.families.decoders import lost_field
from moezoo.adapters.formats import Source, TensorInfo, open_source
from moezoo.adapters.formats.base import FLOAT_DTYPES
from moezoo.adapters.formats.files import quoted
from moezoo.adapters.names import HEAD, SHARED
from moezoo.adapters.shapes import check_shapes
from moezoo.errors import TensorMismatch
from moezoo.registry import Spec

# Routers whose only weights are a classifier's (E, D).
_CLASSIFIERS = ("base", "expert_choice", "gshard", "sinkhorn", "streamed_switch", "switch", "top_k")


@dataclass(frozen=True)
class CheckpointSource:
    """A checkpoint that agrees with its config.

    Attributes:
        tensors: by parameter name in memory; one tensor, or one per expert for a stack.
        left_out: tensors that no conversion takes along, by name on disk, and why.
        task: "conditional_generation", "model" or "encoder".
    """

    source: Source
    description: Description
    task: str
    tensors: Mapping[str, tuple[TensorInfo, ...]] = field(repr=False)
    left_out: Mapping[str, str]

    @property
    def path(self) -> Path:
        return self.source.path

    @property
    def config(self) -> ModelConfig:
        config: ModelConfig = self.description.config
        return config

    @property
    def aliases(self) -> dict[str, str]:
        """Names in the file under which a written one has no tensor, and what it has instead."""
        repeats, found = self.description.aliases, dict[str, str]()
        if isinstance(self.config, DecoderConfig):
            return dict(repeats)
        for name, first in repeats.items():
            written = SHARED if SHARED in (first, repeats.get(first)) else HEAD
            found |= {n: written for n in (name, first) if n != written}
        return {n: w for n, w in found.items() if self.renamed.get(w) != n}

    @property
    def renamed(self) -> dict[str, str]:
        """What is written under its own name though the file has only another for it, and that."""
        places, start = self.description.places, self.description.prefix
        if isinstance(self.config, DecoderConfig):
            return {}
        found = {name: places[name][None] for name in (SHARED, HEAD) if name in places}
        return {n: disk for n, disk in found.items() if start + n not in self.source.tensors}

    @property
    def dtypes(self) -> set[str]:
        """Of all its tensors, as "F32"."""
        return {part.dtype for parts in self.tensors.values() for part in parts}

    def __enter__(self) -> CheckpointSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.source.close()


def open_checkpoint(path: str | Path, *, drop_heads: bool = False) -> CheckpointSource:
    """Open a checkpoint directory or file and check names, shapes and dtypes against its config.

    Args:
        drop_heads: leave out heads that moezoo's models do not have, such as a classifier's.

    Raises CheckpointError or ConfigError naming the file, key or field; weights are not read.
    """
    source = open_source(path)
    try:
        description = describe_decoder(source, drop_heads=drop_heads) or describe(
            source, drop_heads=drop_heads
        )
        try:
            return _checked(source, description)
        except TensorMismatch as error:
            raise _explained(error, description) from None
    except BaseException:
        source.close()
        raise


def _explained(error: TensorMismatch, description: Description) -> TensorMismatch:
    """The error, or the reason why no conversion can take this model."""
    config = description.config
    if isinstance(config, DecoderConfig):
        return lost_field(config, error)
    router, experts = (Spec.parse(spec).name for spec in (config.router, config.experts))
    beyond = [f"the router {router!r}"] if router not in _CLASSIFIERS else []
    beyond += [f"the experts {experts!r}"] if experts != "stacked" else []
    beyond += ["a shared expert"] if config.shared_expert is not None else []
    if not beyond or "moezoo" not in description.family.model_types:
        return error
    return TensorMismatch(
        f"conversions do not know the weights of {' and '.join(beyond)}",
        path=error.path,
        key=error.key,
        expected="routers of a classifier alone, and stacked experts",
        hint="moezoo.load and moezoo.save read and write this model, in any dtype.",
    )


def _checked(source: Source, description: Description) -> CheckpointSource:
    task = task_of(description)
    _refuse_depth(description, task, source)
    tensors: dict[str, tuple[TensorInfo, ...]] = {}
    for name, places in description.places.items():
        experts = sorted(places, key=lambda expert: -1 if expert is None else expert)
        found = tuple(source.info(description.prefix + places[expert]) for expert in experts)
        _check_dtypes(source, found)
        tensors[name] = found
    shapes = {name: _shape(name, parts, source) for name, parts in tensors.items()}
    expected = description.family.shapes(description.config, task)
    names = {name: _on_disk(name, description) for name in expected}
    names |= {name: parts[0].name for name, parts in tensors.items()}
    check_shapes(expected, shapes, path=source.path, names=names)
    return CheckpointSource(source, description, task, tensors, _left_out(source, description))


def _left_out(source: Source, description: Description) -> dict[str, str]:
    """What is no parameter of the model, and why."""
    start = description.prefix
    reasons = {start + name: f"repeats {first}" for name, first in description.aliases.items()}
    reasons |= dict.fromkeys(description.dropped, "of a head that was dropped")
    reasons |= dict.fromkeys(description.outside, "of the larger model around it")
    stray = description.family.is_stray
    strays = [name for name in source.tensors if stray(name.removeprefix(start))]
    return reasons | dict.fromkeys(strays, "never meant anything")


def _refuse_depth(description: Description, task: str, source: Source) -> None:
    """Raise TensorMismatch for more layers than tensors, before the names of all are made: an
    absurd config must not cost time or memory.
    """
    config = description.config
    one_stack = task == "encoder" or isinstance(config, DecoderConfig)
    layers = config.num_layers + (0 if one_stack else config.decoder_layers)
    if layers > len(description.places):
        raise TensorMismatch(
            "config.json names more layers than the checkpoint has weights",
            path=source.path,
            key="num_layers",
            expected=f"at most {len(description.places)}",
            found=layers,
        )


def _on_disk(name: str, description: Description) -> str:
    # The first expert's name stands for its stack: 65,536 names of each are not made to be shown.
    first, *_ = description.family.disk_names(name, num_experts=1)
    return description.prefix + first


def _check_dtypes(source: Source, parts: tuple[TensorInfo, ...]) -> None:
    for info in parts:
        if info.dtype not in FLOAT_DTYPES:
            raise TensorMismatch(
                f"{quoted(info.name)} is of a dtype that weights never have",
                path=source.path,
                key=info.name,
                expected=" or ".join(FLOAT_DTYPES),
                found=info.dtype,
            )


def _shape(name: str, parts: tuple[TensorInfo, ...], source: Source) -> tuple[int, ...]:
    if ".mlp.experts." not in name:
        return parts[0].shape
    odd = next((part for part in parts if part.shape != parts[0].shape), None)
    if odd is not None:
        raise TensorMismatch(
            f"{quoted(odd.name)} has another shape than its fellow experts",
            path=source.path,
            key=odd.name,
            expected=list(parts[0].shape),
            found=list(odd.shape),
        )
    return (len(parts), *parts[0].shape)


def task_of(description: Description) -> str:
    """What a checkpoint holds: "conditional_generation", "model" or "encoder"."""
    if isinstance(description.config, DecoderConfig):
        return "conditional_generation"
    if not description.has_decoder:
        return "encoder"
    architectures = description.values.get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    # What transformers called a model with a tied head until 2020 ends in "Model" too.
    tied = name.endswith(("ForConditionalGeneration", "LMHeadModel"))
    headless = name.endswith("Model") or bool(description.dropped)
    without = headless and not tied and not description.own_head
    return "model" if without else "conditional_generation"
