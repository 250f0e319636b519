"""A mixture of experts with more experts, that computes the same."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from moezoo.adapters.checkpoint_source import CheckpointSource, open_checkpoint
from moezoo.adapters.families import DecoderConfig, Family, layout_for
from moezoo.adapters.names import expert_axis
from moezoo.adapters.tensor_files import TensorPlan
from moezoo.adapters.upcycle.downcycling import known_scale
from moezoo.adapters.upcycle.keyed import keyed_generator, keyed_normals
from moezoo.adapters.upcycle.rewrite import Output, rewrite
from moezoo.errors import ConfigError
from moezoo.registry import Spec

if TYPE_CHECKING:
    from torch import Tensor

# Relative to a router's rows: it decides between twins and changes nothing else.
TWIN_NOISE = 5e-7
_STEPS = 24  # weights of a row that take a step where the dtype is coarser than the noise


def grow(
    path: str | Path,
    out: str | Path,
    *,
    factor: int = 2,
    noise: float = TWIN_NOISE,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Give a model `factor` times as many experts; it computes what it did before.

    Every expert and its router row is there `factor` times. Twins share what was one expert's
    probability, so a Switch model's `wo` is multiplied by `factor` (not with unit weights, where
    nothing is shared). A decoder chooses `factor` times as many experts per token: all twins of
    those that it chose, whose weights add up to theirs.

    Args:
        noise: deviation of what is added to the router's rows, relative to their root mean square,
            so that tokens spread over twins; 0 sends all to the first one. Where the rows' dtype
            is coarser (bfloat16, float16), a few weights of each row move by one step of it.

    Raises ConfigError for a dense model, or a T5's router that chooses several experts per token.
    """
    if isinstance(factor, bool) or not isinstance(factor, int) or not 2 <= factor <= 1024:
        raise ConfigError(
            "factor is out of range", field="factor", expected="2 to 1024", found=repr(factor)[:80]
        )
    with open_checkpoint(path) as checkpoint:
        scale = _scale(checkpoint, factor)
        known, before = known_scale(checkpoint), checkpoint.config
        config = before.replace(num_experts=before.num_experts * factor)
        if isinstance(before, DecoderConfig):
            config = config.replace(choices=before.choices * factor, wo_scale=known)
        else:
            config = config.replace(wo_scale=(known or 1.0) * scale)
        family = layout_for(config, dtypes=checkpoint.dtypes)
        outputs = list(_outputs(checkpoint, family, factor, scale, noise, seed))
        operation = {
            "operation": "grow",
            "factor": factor,
            "noise": noise,
            "seed": seed,
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
    if isinstance(config, DecoderConfig):
        return 1.0
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
    checkpoint: CheckpointSource, family: Family, factor: int, scale: float, noise: float, seed: int
) -> Iterator[Output]:
    count = checkpoint.config.num_experts
    for name, parts in checkpoint.tensors.items():
        names = family.disk_names(name, num_experts=count * factor)
        if ".mlp.experts." in name:
            undo = scale if name.endswith(".wo") else 1.0
            for index, target in enumerate(names):
                part = parts[index % count]
                yield Output(TensorPlan(target, part.dtype, part.shape), part, undo)
        elif ".mlp.router.classifier." in name:
            sizes = list(parts[0].shape)
            sizes[expert_axis(name)] *= factor
            yield Output(
                TensorPlan(names[0], parts[0].dtype, tuple(sizes)),
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
    repeated = torch.cat([rows] * factor, dim=expert_axis(name))
    if name.endswith(".correction"):
        repeated = repeated / factor  # it is added to probabilities, which twins share
    if not name.endswith(".weight") or noise == 0:
        return tensor_bytes(repeated)
    if noise < torch.finfo(rows.dtype).eps:
        return tensor_bytes(stepped(repeated, noise, seed=seed, name=f"{name}.grow"))
    std = noise * float(rows.double().square().mean().sqrt())
    draws = torch.tensor(keyed_normals(seed, f"{name}.grow", repeated.numel(), std), device="cpu")
    return tensor_bytes((repeated.double() + draws.view(repeated.shape)).to(rows.dtype))


def stepped(rows: Tensor, noise: float, *, seed: int, name: str) -> Tensor:
    """Rows (E, D) with noise that is finer than their dtype: in each, the weights nearest to zero,
    whose steps are the finest, become the next number up or down.

    As many of D take a step of epsilon as give the sum over all the deviation that noise on each
    would; at least enough to decide between twins whatever the token.
    """
    import torch

    experts, width = rows.shape
    share = (noise / torch.finfo(rows.dtype).eps) ** 2
    count = min(width, max(_STEPS, round(width * share)))
    place = rows.float().abs().topk(count, dim=1, largest=False).indices
    up = torch.rand(experts, count, generator=keyed_generator(seed, name), device="cpu") < 0.5
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()]
    bits = rows.contiguous().view(words)
    sign = torch.iinfo(words).min  # of a float: its highest bit, above what orders its size
    chosen = bits.gather(1, place)
    size = chosen & ~sign
    # Zero has no size to lose: it becomes the smallest number of either sign.
    moved = torch.where(up | (size == 0), size + 1, size - 1) | (chosen & sign)
    moved = torch.where((size == 0) & ~up, moved | sign, moved)
    return bits.scatter(1, place, moved).view(rows.dtype)
