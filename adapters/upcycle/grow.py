"""A mixture of experts with more experts, that computes the same."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from moezoo.adapters.checkpoint_source import CheckpointSource, open_checkpoint
from moezoo.adapters.families import layout_for
from moezoo.adapters.names import disk_names
from moezoo.adapters.tensor_files import TensorPlan
from moezoo.adapters.upcycle.downcycling import scaled_further
from moezoo.adapters.upcycle.keyed import keyed_normals
from moezoo.adapters.upcycle.rewrite import Output, rewrite
from moezoo.errors import ConfigError
from moezoo.registry import Spec

# Relative to a router's rows: it decides between twins and changes nothing else.
TWIN_NOISE = 5e-7


def grow(
    path: str | Path,
    out: str | Path,
    *,
    factor: int = 2,
    noise: float = TWIN_NOISE,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Give a top-1 model `factor` times as many experts; it computes what it did before.

    Every expert and its router row is there `factor` times. Twins share what was one expert's
    probability, so `wo` is multiplied by `factor` (not with unit weights, where nothing is shared).

    Args:
        noise: deviation of what is added to the router's rows, relative to their root mean square,
            so that tokens spread over twins; 0 sends all to the first one.

    Raises ConfigError for a dense model or a router that does not choose one expert per token.
    """
    if isinstance(factor, bool) or not isinstance(factor, int) or not 2 <= factor <= 1024:
        raise ConfigError(
            "factor is out of range", field="factor", expected="2 to 1024", found=repr(factor)[:80]
        )
    with open_checkpoint(path) as checkpoint:
        scale = _scale(checkpoint, factor)
        config = checkpoint.config.replace(num_experts=checkpoint.config.num_experts * factor)
        family = layout_for(config)
        outputs = list(_outputs(checkpoint, family.mlp, factor, scale, noise, seed))
        operation = {
            "operation": "grow",
            "factor": factor,
            "noise": noise,
            "seed": seed,
            **scaled_further(checkpoint, scale),
        }
        return rewrite(
            checkpoint,
            out,
            outputs,
            config=config,
            family=family,
            operation=operation,
            overwrite=overwrite,
        )


def _scale(checkpoint: CheckpointSource, factor: int) -> float:
    config = checkpoint.config
    if not (config.encoder_sparse or config.decoder_sparse):
        raise ConfigError(
            "the model is dense", field="source", path=checkpoint.path, hint="Use `moezoo upcycle`."
        )
    router = Spec.parse(config.router, kind="router")
    if router.name != "switch":
        raise ConfigError(
            f"twins of an expert would both be chosen by the router {router.name!r}",
            field="router",
            path=checkpoint.path,
            expected="switch",
        )
    return 1.0 if router.options.get("weight") == "unit" else float(factor)


def _outputs(
    checkpoint: CheckpointSource, mlp: str, factor: int, scale: float, noise: float, seed: int
) -> Iterator[Output]:
    count = checkpoint.config.num_experts
    for name, parts in checkpoint.tensors.items():
        names = disk_names(name, mlp=mlp, num_experts=count * factor)
        if ".mlp.experts." in name:
            undo = scale if name.endswith(".wo") else 1.0
            for index, target in enumerate(names):
                part = parts[index % count]
                yield Output(TensorPlan(target, part.dtype, part.shape), part, undo)
        elif ".mlp.router.classifier." in name:
            shape = (count * factor, *parts[0].shape[1:])
            yield Output(
                TensorPlan(names[0], parts[0].dtype, shape),
                make=partial(_rows, checkpoint, name, factor, noise, seed),
            )
        else:
            yield Output(TensorPlan(names[0], parts[0].dtype, parts[0].shape), parts[0])


def _rows(
    checkpoint: CheckpointSource, name: str, factor: int, noise: float, seed: int
) -> memoryview:
    """The router's rows, repeated, with a little noise."""
    import torch

    from moezoo.adapters.formats.base import tensor_bytes

    (info,) = checkpoint.tensors[name]
    rows = checkpoint.source.tensor(info.name)
    repeated = torch.cat([rows] * factor).double()
    if not name.endswith(".bias"):
        std = noise * float(rows.double().square().mean().sqrt())
        draws = keyed_normals(seed, f"{name}.grow", repeated.numel(), std)
        repeated += torch.tensor(draws, dtype=torch.float64).view(repeated.shape)
    return tensor_bytes(repeated.to(rows.dtype))
