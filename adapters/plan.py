"""What an upcycling will do, tensor by tensor, decided before any weight is read.

The plan is the only thing that the streaming conversion executes; `moezoo plan` prints it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from moezoo.adapters.buildable import check_buildable
from moezoo.adapters.checkpoint_source import CheckpointSource
from moezoo.adapters.families import DecoderConfig, Family, ModelConfig, expressible, layout_for
from moezoo.adapters.families.decoders import constant_of, filled, zero_shapes
from moezoo.adapters.formats import TensorInfo
from moezoo.adapters.left_behind import left_behind
from moezoo.adapters.names import SHARED
from moezoo.adapters.shapes import expert_width, matrix_names
from moezoo.adapters.tensor_files import TensorPlan
from moezoo.adapters.upcycle.decoders import sparse_sibling
from moezoo.adapters.upcycle.inits import ExpertInit, RouterInit, expert_inits, router_inits
from moezoo.adapters.upcycle.preservation import router_for
from moezoo.adapters.upcycle.recipe import DTYPES, Recipe
from moezoo.adapters.upcycle.scaling import constant_bytes
from moezoo.adapters.upcycle.target import choice_words, settled, target_config
from moezoo.config import SwitchConfig
from moezoo.cost import layer_cost
from moezoo.errors import ConfigError


@dataclass(frozen=True)
class Move:
    """One source tensor and what becomes of it: itself, or a matrix of every expert.

    `layer` names the sparse layer that it feeds, such as "encoder.blocks.1.mlp", and `matrix` is
    its part there; both are None for a tensor that is only copied, to every name that the layout
    wants it under. `shared` is that part of an expert that every token passes, with its own scale.
    """

    parameter: str
    source: TensorInfo
    targets: tuple[TensorPlan, ...]
    layer: str | None = None
    matrix: str | None = None
    scale: float = 1.0
    shared: TensorPlan | None = None
    shared_scale: float = 1.0

    @property
    def written(self) -> tuple[TensorPlan, ...]:
        """All that becomes of it."""
        return self.targets if self.shared is None else (*self.targets, self.shared)


@dataclass(frozen=True)
class Plan:
    """A decided conversion. `layout_reason` says why Hugging Face's layout cannot hold it."""

    recipe: Recipe
    config: ModelConfig
    source_config: ModelConfig
    task: str
    family: Family
    layout_reason: str
    init: ExpertInit
    router_init: RouterInit
    moves: tuple[Move, ...] = field(repr=False)
    routers: dict[str, TensorPlan] = field(repr=False)  # by layer
    constants: dict[str, tuple[TensorPlan, ...]] = field(repr=False)  # by layer, of the router too
    left_out: Mapping[str, str]  # tensors of the source that are not converted, and why
    behind: Mapping[str, Any]  # what provenance says of them, for `downcycle` to write them again

    @property
    def streams(self) -> bool:
        """Whether bytes are enough: no arithmetic but scaling, no dtype conversion, no text."""
        return (
            self.init.streams
            and not self.router_init.needs_inputs
            and all(
                move.source.path is not None and move.source.dtype == target.dtype
                for move in self.moves
                for target in move.targets[:1]
            )
        )

    @property
    def scale(self) -> float:
        """The factor on `wo`."""
        return self.config.wo_scale or 1.0

    @property
    def expressible(self) -> bool:
        return not self.layout_reason

    @property
    def layout(self) -> str:
        """The layout that is written, in words, and why it is moezoo's."""
        return layout_words(self.family, self.layout_reason)

    def outputs(self) -> Iterator[TensorPlan]:
        """Every tensor to be written, in the order of the files."""
        drawn = set()
        for move in self.moves:
            if move.layer is not None and move.layer not in drawn:
                drawn.add(move.layer)
                yield self.routers[move.layer]
                yield from self.constants.get(move.layer, ())
            yield from move.written

    @property
    def router_choice(self) -> str:
        """Which router the layers have, what that gives up, and the flag for the other."""
        config = self.config
        return choice_words(self.recipe, config) if isinstance(config, SwitchConfig) else ""

    @property
    def bytes_read(self) -> int:
        return sum(move.source.nbytes for move in self.moves)

    @property
    def bytes_written(self) -> int:
        return sum(tensor.nbytes for tensor in self.outputs())

    @property
    def parameters(self) -> int:
        total = self._routing_parameters
        for move in self.moves:
            kept = move.written if move.layer is not None else move.targets[:1]
            total += sum(math.prod(target.shape) for target in kept)
        return total

    @property
    def active_parameters(self) -> int:
        """Parameters that one token meets: its chosen experts only."""
        total, chosen = self._routing_parameters, choices_of(self.config)
        for move in self.moves:
            count = 1 if move.layer is None else min(chosen, len(move.targets))
            total += count * math.prod(move.targets[0].shape)
            total += 0 if move.shared is None else math.prod(move.shared.shape)
        return total

    @property
    def _routing_parameters(self) -> int:
        constants = (plan for layer in self.constants.values() for plan in layer)
        return sum(math.prod(plan.shape) for plan in (*self.routers.values(), *constants))

    def constant(self, tensor: TensorPlan) -> bytes:
        """The content of one of `constants`."""
        return constant_bytes(tensor.dtype, tensor.nbytes, constant_of(self.config, tensor.name))


def choices_of(config: ModelConfig) -> int:
    """How many experts a token meets in a sparse layer."""
    if isinstance(config, DecoderConfig):
        return config.choices
    assert isinstance(config, SwitchConfig)
    return layer_cost(config).choices


def make_plan(checkpoint: CheckpointSource, recipe: Recipe, *, layout: str = "auto") -> Plan:
    """Decide everything about an upcycling, or refuse it with the reason.

    Raises ConfigError for a source that is sparse already, for layers that do not exist, for an
    initialisation or router that does not fit, and for a `layout` that cannot hold the result.
    """
    source_config = checkpoint.config
    if source_config.encoder_sparse or source_config.decoder_sparse:
        raise ConfigError(
            "the source is a mixture of experts already",
            field="source",
            path=checkpoint.path,
            hint="Use `moezoo grow` for more experts.",
        )
    init = expert_inits.build(recipe.init)
    init.check(source_config.d_ff, recipe.num_experts)
    dtypes = {DTYPES[recipe.dtype]} if recipe.dtype else checkpoint.dtypes
    recipe = settled(recipe, source_config, checkpoint.task, dtypes=dtypes, layout=layout)
    assert recipe.router_init is not None
    config, shared_scale = _target(checkpoint, recipe, init)
    family = layout_for(config, layout, dtypes=dtypes)
    moves = tuple(_moves(checkpoint, config, family, recipe, shared_scale))
    routers = dict(_routers(moves, config, family))
    return Plan(
        recipe=recipe,
        config=config,
        source_config=source_config,
        task=checkpoint.task,
        family=family,
        layout_reason=expressible(config, dtypes)[1],
        init=init,
        router_init=router_inits.build(recipe.router_init),
        moves=moves,
        routers=routers,
        constants=dict(_constants(routers, config, family)),
        left_out=checkpoint.left_out,
        behind=left_behind(checkpoint),
    )


def _target(
    checkpoint: CheckpointSource, recipe: Recipe, init: ExpertInit
) -> tuple[ModelConfig, float]:
    """The config of the upcycled model, and the factor on a shared expert's `wo`."""
    source = checkpoint.config
    if isinstance(source, DecoderConfig):
        try:
            return sparse_sibling(source, recipe, init)
        except ConfigError as error:
            if error.path is None and error.field in source.full:
                error.path = str(checkpoint.source.directory / "config.json")
                error.args = (str(error),)
            raise
    assert isinstance(source, SwitchConfig)
    router = router_for(init, recipe.router, recipe.num_experts)
    config = target_config(source, recipe, init, router, checkpoint.task)
    check_buildable(config, checkpoint.task)
    return config, 1.0


def layout_words(family: Family, reason: str) -> str:
    """What a layout is called, with the reason for moezoo's own ("" when it was asked for)."""
    if "moezoo" in family.model_types:
        return f"moezoo, because {reason}" if reason else "moezoo, as asked for"
    return f"Hugging Face {family.title}"


def _moves(
    checkpoint: CheckpointSource,
    config: ModelConfig,
    family: Family,
    recipe: Recipe,
    shared_scale: float,
) -> Iterator[Move]:
    scale = config.wo_scale or 1.0
    layers = {f"encoder.blocks.{i}.mlp" for i in config.encoder_sparse}
    layers |= {f"decoder.blocks.{i}.mlp" for i in config.decoder_sparse}
    order = {name: i for i, name in enumerate(checkpoint.source.tensors)}
    count = config.num_experts
    for name, parts in sorted(checkpoint.tensors.items(), key=lambda item: order[item[1][0].name]):
        info = parts[0]
        dtype = DTYPES[recipe.dtype] if recipe.dtype else info.dtype
        layer, _, rest = name.rpartition(".mlp.")
        layer, matrix = f"{layer}.mlp", rest.removesuffix(".weight")
        if layer not in layers:
            names = family.disk_names(name)
            names += family.copies(config, checkpoint.task) if name == SHARED else ()
            yield Move(name, info, tuple(TensorPlan(n, dtype, info.shape) for n in names))
            continue
        targets = family.disk_names(f"{layer}.experts.{matrix}", num_experts=count)
        width = expert_width(config)
        shape = (config.d_model, width) if matrix == "wo" else (width, config.d_model)
        plans = tuple(TensorPlan(target, dtype, shape) for target in targets)
        shared = None
        if isinstance(config, DecoderConfig) and config.shares:
            (common,) = family.disk_names(f"{layer}.shared.{matrix}.weight")
            shared = TensorPlan(common, dtype, info.shape)
        factors = (scale, shared_scale) if matrix == "wo" else (1.0, 1.0)
        yield Move(name, info, plans, layer, matrix, factors[0], shared, factors[1])


def _routers(
    moves: tuple[Move, ...], config: ModelConfig, family: Family
) -> Iterator[tuple[str, TensorPlan]]:
    for move in moves:
        if move.layer is not None and move.matrix == matrix_names(config)[0]:
            name = f"{move.layer}.router.classifier.weight"
            (target,) = family.disk_names(name)
            shape = (config.num_experts, config.d_model)
            yield move.layer, TensorPlan(target, move.targets[0].dtype, shape)


def _constants(
    routers: Mapping[str, TensorPlan], config: ModelConfig, family: Family
) -> Iterator[tuple[str, tuple[TensorPlan, ...]]]:
    """What is the same whatever the source holds, by layer; nothing where there is no such."""
    if not isinstance(config, DecoderConfig) or config.sparse_kind is None:
        return
    shapes, fills = zero_shapes(config.sparse_kind, config), filled(config)
    for layer, router in routers.items() if shapes or fills else ():
        number = layer.split(".")[2]
        names = {f"{layer}.router.{name}": shape for name, shape in shapes.items()}
        names |= {f"model.layers.{number}.{name}": shape for name, (shape, _) in fills.items()}
        yield (
            layer,
            tuple(
                TensorPlan(family.disk_names(name)[0], router.dtype, shape)
                for name, shape in names.items()
            ),
        )
