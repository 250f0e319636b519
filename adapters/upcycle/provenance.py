"""Where an upcycled model comes from: kept in config.json, in the weights' metadata, in a card."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import moezoo
from moezoo.adapters.card import card, made_by, named
from moezoo.adapters.checkpoint_source import CheckpointSource
from moezoo.adapters.families import DecoderConfig, Family, ModelConfig, expressible
from moezoo.adapters.formats import Source
from moezoo.adapters.left_behind import known, left_behind
from moezoo.adapters.plan import Plan, layout_words
from moezoo.adapters.tensor_files import TensorPlan
from moezoo.adapters.upcycle.watch import hash_names
from moezoo.frozen import thawed

if TYPE_CHECKING:
    from moezoo.adapters.upcycle.calibration import Calibration

_UNKNOWN = "0" * 64


@dataclass(frozen=True)
class Provenance:
    """What made a model: source files with their sha256, recipe, scale, moezoo's version.

    Holds nothing that depends on the time or the machine, so that equal work gives equal bytes.
    """

    source: str
    files: Mapping[str, str]
    recipe: Mapping[str, Any]
    scale: float
    behind: Mapping[str, Any] = field(default_factory=dict)  # see `left_behind`
    operation: str = "upcycle"
    calibration: str | None = None  # sha256 of the sample text's ids
    config: Mapping[str, Any] | None = None  # config.json of a decoder, for `downcycle`

    def to_dict(self) -> dict[str, Any]:
        sampled = {} if self.calibration is None else {"calibration_sha256": self.calibration}
        told = {} if self.config is None else {"source_config": dict(self.config)}
        return {
            **sampled,
            **told,
            **self.behind,
            "moezoo_version": moezoo.__version__,
            "operation": self.operation,
            "recipe": dict(self.recipe),
            "source": self.source,
            "source_sha256": dict(sorted(self.files.items())),
            "wo_scale": self.scale,
        }

    def metadata(self) -> dict[str, str]:
        """For the header of a safetensors file."""
        return {"format": "pt", "moezoo": json.dumps(self.to_dict(), sort_keys=True)}

    def with_hashes(self, hashes: Mapping[str, str]) -> Provenance:
        return replace(self, files=dict(hashes))


def unhashed(plan: Plan, source: Source, calibration: Calibration | None = None) -> Provenance:
    """Provenance whose hashes are still to come, of the length that it will have."""
    fitted = plan.router_init.needs_inputs and calibration is not None
    return Provenance(
        source=named(source.directory),
        files=dict.fromkeys(hash_names(source), _UNKNOWN),
        recipe=plan.recipe.to_dict(),
        scale=plan.scale,
        behind=plan.behind,
        calibration=calibration.sha256() if fitted and calibration else None,
        config=source_config(plan.config),
    )


def source_config(config: ModelConfig) -> dict[str, Any] | None:
    """config.json of the dense decoder that a sparse one was made from; None where none is known,
    and of a T5, whose own says it.
    """
    if not isinstance(config, DecoderConfig) or config.dense_values is None:
        return None
    values: dict[str, Any] = thawed(config.dense_values)
    return values


def rewritten(
    operation: Mapping[str, Any],
    config: ModelConfig,
    sources: Sequence[CheckpointSource],
    hashes: Sequence[Mapping[str, str]] = (),
) -> dict[str, Any]:
    """Provenance of a checkpoint made from others, with theirs under `made_from`.

    Args:
        config: of what is made.
        hashes: sha256 of each source's files; left out, placeholders of their length.
    """
    made_from = []
    for index, checkpoint in enumerate(sources):
        source = checkpoint.source
        blank = dict.fromkeys(hash_names(source), _UNKNOWN)
        found = dict(hashes[index]) if hashes else blank
        entry: dict[str, Any] = {"source": named(source.directory), "source_sha256": found}
        before = checkpoint.description.values.get("moezoo_provenance")
        if isinstance(before, Mapping):
            entry["provenance"] = dict(before)
        made_from.append(entry)
    behind = left_behind(sources[0])
    if isinstance(sources[0].description.values.get("moezoo_provenance"), Mapping):
        # What moezoo wrote has aliases for its layout's sake; the dense source's are in here.
        dropped = {"dropped_heads": behind["dropped_heads"]} if "dropped_heads" in behind else {}
        behind = known(sources[0]) | dropped
    version = {"moezoo_version": moezoo.__version__}
    told = source_config(config)
    dense: dict[str, Any] = {} if told is None else {"source_config": told}
    if isinstance(config, DecoderConfig) and config.decoder_sparse and config.wo_scale is not None:
        dense["wo_scale"] = config.wo_scale  # which its config.json has no word for
    return {**version, **operation, **behind, **dense, "made_from": made_from}


def model_card(
    plan: Plan, checkpoint: CheckpointSource, provenance: Provenance, verification: str | None
) -> str:
    """README.md of an upcycled model: what it is, what it costs, how it was made and checked."""
    rows = {
        "parameters": f"{plan.parameters:,}",
        "active per token": f"{plan.active_parameters:,}",
        **_shape_rows(plan.config),
        "layout": plan.layout,
        "verification": verification or "not verified; run `moezoo verify OUT --against SRC`",
    }
    recipe = provenance.to_dict()["recipe"]
    command = "moezoo upcycle SRC OUT --recipe recipe.json"
    how = f"with this recipe (`{command}` makes the same bytes again)"
    return card(
        f"{provenance.source}, upcycled to {plan.config.num_experts} experts",
        rows,
        sources=[checkpoint.source.directory],
        model_type=plan.family.model_types[0],
        task=plan.task,
        parts=[made_by(provenance.files.items(), how, _json(recipe))],
    )


def rewritten_card(
    config: ModelConfig,
    family: Family,
    outputs: Sequence[TensorPlan],
    made: Mapping[str, Any],
    checkpoints: Sequence[CheckpointSource],
) -> str:
    """README.md of a checkpoint of the tensors `outputs`, made from others (`rewritten`)."""
    told = ("moezoo_version", "made_from", "source_config", "wo_scale")
    operation = {k: v for k, v in made.items() if k not in told}
    sparse = bool(config.encoder_sparse or config.decoder_sparse)
    rows = {
        "parameters": f"{sum(math.prod(plan.shape) for plan in outputs):,}",
        **(_shape_rows(config) if sparse else {"feed-forward": config.feed_forward_proj}),
        "layout": layout_words(family, expressible(config, {plan.dtype for plan in outputs})[1]),
    }
    sources = made["made_from"]
    names = " and ".join(entry["source"] for entry in sources)
    files = [
        (name if len(sources) == 1 else f"{entry['source']}/{name}", value)
        for entry in sources
        for name, value in entry["source_sha256"].items()
    ]
    how = f"by `moezoo {operation['operation']}`"
    return card(
        f"{names}, after {operation['operation']}",
        rows,
        sources=[checkpoint.source.directory for checkpoint in checkpoints],
        model_type=family.model_types[0],
        task=checkpoints[0].task,
        relation="merge" if operation["operation"] == "merge" else None,
        parts=[made_by(files, how, _json(operation))],
    )


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, sort_keys=True)


def _shape_rows(config: ModelConfig) -> dict[str, str]:
    if isinstance(config, DecoderConfig):
        return {
            "experts per sparse layer": str(config.num_experts),
            "experts per token": str(config.choices),
            "sparse layers": _listed(config.decoder_sparse),
            "shared expert": "yes" if config.shares else "no",
            "factor on each expert's down projection": f"{config.wo_scale or 1.0:g}",
        }
    return {
        "experts per sparse layer": str(config.num_experts),
        "sparse encoder layers": _listed(config.encoder_sparse),
        "sparse decoder layers": _listed(config.decoder_sparse),
        "feed-forward": config.feed_forward_proj,
        "factor on `wo`": f"{config.wo_scale or 1.0:g}",
    }


def _listed(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers)) or "none"
