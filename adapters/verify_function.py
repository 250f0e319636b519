"""The levels of verification that run models: layers, logits, routers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moezoo.adapters.checkpoint import load
from moezoo.adapters.checkpoint_source import CheckpointSource
from moezoo.adapters.formats.base import torch_dtype
from moezoo.adapters.plan import Plan
from moezoo.adapters.upcycle.keyed import keyed_generator
from moezoo.adapters.verification import LevelResult
from moezoo.assemble import make_moe
from moezoo.config import SwitchConfig
from moezoo.models.feed_forward import DenseMLP
from moezoo.recording import record
from moezoo.records import Assignment, Routing

# Relative error that an exact upcycling may show, by the coarser dtype of the two.
_TOLERANCE = {"F64": 1e-5, "F32": 1e-5, "F16": 5e-3, "BF16": 5e-2}
_BITS = 40  # between the largest and the smallest number of float16
_TOKENS, _BATCH, _LENGTH = 64, 2, 24


@torch.no_grad()
def layers_agree(plan: Plan, source: CheckpointSource, made: CheckpointSource) -> LevelResult:
    """Level 3: every sparse layer on its own, one at a time, against the dense one, in float32; of
    a model in float16 in that too, on inputs that take the dense layer's results to the end of its
    range: there it must give what it gives in float32.
    """
    errors: dict[str, float] = {}
    for layer in plan.routers:
        dense = DenseMLP(
            plan.source_config.d_model,
            plan.source_config.d_ff,
            activation_name=plan.source_config.feed_forward_proj,
        ).eval()
        config = plan.config.replace(capacity="dropless", dropout_rate=0.0)
        sparse = make_moe(config, decoder=layer.startswith("decoder")).eval()
        fill(dense, source, layer)
        fill(sparse, made, layer)
        generator = keyed_generator(plan.recipe.seed, f"{layer}.verify")
        x = torch.randn(1, _TOKENS, plan.config.d_model, generator=generator, device="cpu")
        expected, (found, _) = dense(x), sparse(x)
        errors[layer] = relative(found, expected)
        if "F16" in made.dtypes:
            x = _reaching(dense, x, expected)
            # Not what the dense layer gives: a large input makes nearly equal rows differ.
            (expected, _), (found, _) = sparse(x.float()), sparse.half()(x)
            errors[layer] = max(errors[layer], relative(found.float(), expected))
    worst = max(errors, key=lambda layer: errors[layer])
    return judged(3, plan, made, errors[worst], f"layers within {errors[worst]:.1e}", errors)


@torch.no_grad()
def logits_agree(plan: Plan, source: CheckpointSource, made: CheckpointSource) -> LevelResult:
    """Level 4: the whole model on random ids, and how many tokens its own capacity would drop; in
    float32, and a model in float16 in that too.
    """
    ids = random_ids(plan)
    drop_heads = bool(source.description.dropped)
    dense = load(source.path, dtype=torch.float32, drop_heads=drop_heads)
    expected = _outputs(dense, ids, plan)
    disturb(dense, plan, made, _wo)
    sensitivity = relative(_outputs(dense, ids, plan), expected)
    del dense
    model = load(made.path, dtype=torch.float32, capacity="dropless")
    error = relative(_outputs(model, ids, plan), expected)
    del model
    if "F16" in made.dtypes:
        error = max(error, _float16_error(plan, source, made))
    # As it will run: the capacity policy of the recipe may drop.
    assert isinstance(plan.config, SwitchConfig)
    own = load(made.path, dtype=torch.float32, capacity=plan.config.capacity)
    with record(own) as tape:
        _outputs(own, ids, plan)
    offered = sum(int(r.proposed.kept.sum()) for r in _routings(tape))
    kept = sum(int(r.assignment.kept.sum()) for r in _routings(tape))
    dropped = offered - kept
    summary = f"logits within {error:.1e}, {dropped} of {offered} tokens dropped"
    numbers = {"dropped": dropped, "offered": offered}
    return judged(4, plan, made, error, summary, numbers, least=2.0 * sensitivity)


@torch.no_grad()
def routers_are_healthy(
    plan: Plan, source: CheckpointSource, made: CheckpointSource
) -> LevelResult:
    """Level 5: how evenly random tokens spread over the experts; a report, with no bar to pass
    except that probabilities are finite.
    """
    model = load(made.path, dtype=torch.float32, capacity="dropless")
    with record(model) as tape:
        _outputs(model, random_ids(plan), plan)
    return spread(plan, {layer: routing for layer, (routing,) in tape.by_layer.items()})


def spread(plan: Plan, routings: Mapping[str, Routing]) -> LevelResult:
    """Level 5 from the routing of each layer: loads, and their entropy beside that of even ones."""
    layers: dict[str, Any] = {}
    finite = True
    for layer, routing in routings.items():
        pairs = routing.assignment
        assert isinstance(pairs, Assignment)
        counts = torch.bincount(pairs.expert, minlength=plan.config.num_experts)
        share = counts / counts.sum()
        entropy = float((share * (1.0 / share.clamp(min=1e-12)).log()).sum())
        finite &= routing.probs is None or bool(routing.probs.isfinite().all())
        layers[layer] = {"load": counts.tolist(), "entropy": round(entropy, 4)}
    even = math.log(plan.config.num_experts)
    worst = min(entry["entropy"] for entry in layers.values())
    summary = f"load entropy at least {worst:.2f} of {even:.2f}"
    return LevelResult(5, finite, summary, {"layers": layers, "even_entropy": round(even, 4)})


def _reaching(dense: DenseMLP, x: Tensor, y: Tensor) -> Tensor:
    """x in float16, times the power of two that takes the results of `dense` to within a factor of
    four of its range; `dense`, which gives y for x, is in float16 afterwards.
    """
    limit = torch.finfo(torch.float16).max
    room = limit / float(y.abs().nan_to_num(limit, limit).max().clamp(1e-6, limit))
    degree = 2 if dense.gated else 1  # what a large input's factor becomes in the result
    power = math.floor((math.log2(room) - 1.0) / degree)
    dense.half()
    # The hidden units may leave the range before the results do; of weights that do, none is left.
    while power > -_BITS and not bool(dense((x * 2.0**power).half()).isfinite().all()):
        power -= 1
    return (x * 2.0**power).half()


def fill(module: nn.Module, checkpoint: CheckpointSource, layer: str) -> None:
    """Give a layer the tensors that a checkpoint has for it, in float32."""
    state: dict[str, Tensor] = {}
    for name in module.state_dict():
        parts = [checkpoint.source.tensor(i.name) for i in checkpoint.tensors[f"{layer}.{name}"]]
        stacked = ".experts." in f".{name}" and not isinstance(module, DenseMLP)
        state[name] = (torch.stack(parts) if stacked else parts[0]).float()
    module.load_state_dict(state, assign=True)


def _float16_error(plan: Plan, source: CheckpointSource, made: CheckpointSource) -> float:
    """How far logits in float16 are from the dense model's in it; 0 where those are not finite."""
    drop_heads = bool(source.description.dropped)
    dense = load(source.path, dtype=torch.float16, drop_heads=drop_heads)
    expected = _outputs(dense, random_ids(plan), plan).float()
    if not bool(expected.isfinite().all()):
        return 0.0
    model = load(made.path, dtype=torch.float16, capacity="dropless")
    return relative(_outputs(model, random_ids(plan), plan).float(), expected)


def disturb(
    dense: nn.Module,
    plan: Plan,
    made: CheckpointSource,
    down: Callable[[nn.Module, Plan, str], nn.Parameter],
) -> None:
    """Change a dense model as little as a sound conversion may: round its weights to the target's
    dtypes, and move its feed-forward networks by what the third level lets pass.

    What this does to the logits grows with the depth and the weights, and no constant holds for
    all of them.
    """
    dtypes = {info.dtype for info in made.source.tensors.values()}
    for narrow in dtypes & {"F16", "BF16"}:
        for parameter in dense.parameters():
            parameter.copy_(parameter.to(torch_dtype(narrow)))
    for layer in plan.routers:
        weight = down(dense, plan, layer)
        generator = keyed_generator(plan.recipe.seed, f"{layer}.disturb")
        noise = torch.randn(weight.shape, generator=generator, device="cpu")
        weight.mul_(noise.mul_(_TOLERANCE["F32"]).add_(1.0))


def _wo(dense: nn.Module, _: Plan, layer: str) -> nn.Parameter:
    return dense.get_submodule(layer).get_parameter("wo.weight")


def judged(
    level: int,
    plan: Plan,
    made: CheckpointSource,
    error: float,
    summary: str,
    numbers: dict[str, Any],
    *,
    least: float = 0.0,
) -> LevelResult:
    """Passed when within tolerance (at least `least`), or when the recipe does not promise
    exactness.
    """
    promised = plan.init.exact and plan.recipe.preserve == "exact"
    dtypes = {info.dtype for info in made.source.tensors.values()}
    tolerance = max(least, *(_TOLERANCE[dtype] for dtype in dtypes))
    passed = math.isfinite(error) and (error <= tolerance or not promised)
    note = "" if promised else " (not promised to be exact)"
    facts = {"error": error, "tolerance": tolerance if promised else None, "details": numbers}
    return LevelResult(level, passed, summary + note, facts)


def relative(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over that of what was expected; infinity for NaN."""
    error = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
    return math.inf if math.isnan(error) else error


def random_ids(plan: Plan) -> Tensor:
    """Ids (B, L) of tokens that both models know, the same whenever they are asked for."""
    size = _tokens(plan)
    generator = keyed_generator(plan.recipe.seed, "verify")
    return torch.randint(
        min(2, size - 1), size, (_BATCH, _LENGTH), generator=generator, device="cpu"
    )


def _tokens(plan: Plan) -> int:
    """How many tokens both models know: all, unless an export gave one another vocabulary."""
    return min(plan.config.vocab_size, plan.source_config.vocab_size)


def _outputs(model: nn.Module, ids: Tensor, plan: Plan) -> Tensor:
    """Logits of the tokens that both models know, or hidden states where there is no head."""
    output = model(ids, decoder_input_ids=ids) if hasattr(model, "decoder") else model(ids)
    if output.logits is not None:
        return output.logits[..., : _tokens(plan)]  # type: ignore[no-any-return]
    values = output.last_hidden_state
    assert isinstance(values, Tensor)
    return values


def _routings(tape: Any) -> list[Any]:
    return [routing for calls in tape.by_layer.values() for routing in calls]
