"""The parameters of a model by name and shape, from its config alone: what a checkpoint must hold.

No torch, nothing allocated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moezoo.adapters.formats.files import quoted
from moezoo.adapters.names import HEAD, SHARED, TABLES
from moezoo.config import SwitchConfig
from moezoo.errors import TensorMismatch, did_you_mean
from moezoo.registry import Spec

Shape = tuple[int, ...]


def parameter_shapes(config: SwitchConfig, task: str) -> dict[str, Shape]:
    """The shape of every parameter by its name in memory; experts are stacked (E, ...).

    Args:
        task: "conditional_generation", "model" or "encoder".
    """
    width = config.d_model
    shapes: dict[str, Shape] = {SHARED: (config.vocab_size, width)}
    stacks = [("encoder", config.num_layers, config.encoder_sparse)]
    if task != "encoder":
        stacks.append(("decoder", config.decoder_layers, config.decoder_sparse))
    for stack, layers, sparse in stacks:
        if stack in config.own_embeddings:
            shapes[TABLES[stack]] = (config.vocab_size, width)
        for index in range(layers):
            start = f"{stack}.blocks.{index}"
            shapes.update(_attention(config, f"{start}.attention"))
            if index == 0 or config.position_bias_every_layer:
                buckets = (config.relative_attention_num_buckets, config.num_heads)
                shapes[f"{start}.attention.position_bias.weight"] = buckets
            shapes[f"{start}.attention_norm.weight"] = (width,)
            if stack == "decoder":
                shapes.update(_attention(config, f"{start}.cross_attention"))
                shapes[f"{start}.cross_norm.weight"] = (width,)
            shapes[f"{start}.mlp_norm.weight"] = (width,)
            shapes.update(_mlp(config, f"{start}.mlp", sparse=index in sparse))
        shapes[f"{stack}.final_norm.weight"] = (width,)
    if task == "conditional_generation" and not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, width)
    return shapes


def matrix_names(config: Any) -> tuple[str, ...]:
    """The matrices of one feed-forward network of a T5 or a decoder, in reading order."""
    return ("wi_0", "wi_1", "wo") if config.is_gated else ("wi", "wo")


def expert_width(config: Any) -> int:
    """The hidden width of one expert."""
    return int(Spec.parse(config.experts).options.get("d_ff", config.d_ff))


def check_shapes(
    expected: Mapping[str, Shape],
    found: Mapping[str, Shape],
    *,
    path: object,
    names: Mapping[str, str],
) -> None:
    """Raise TensorMismatch for the first tensor that is missing, unexpected or of another shape.

    Args:
        names: what each parameter is called in the checkpoint, for the message.
    """
    for name in expected:
        if name not in found:
            strange = [other for other in found if other not in expected]
            raise TensorMismatch(
                f"the checkpoint lacks {quoted(names.get(name, name))}"
                + _more(sum(other not in found for other in expected) - 1),
                path=path,
                key=names.get(name, name),
                hint=did_you_mean(name, strange) if strange else None,
            )
    for name, shape in found.items():
        shown = quoted(names.get(name, name))
        if name not in expected:
            raise TensorMismatch(
                f"the config has no place for {shown}"
                + _more(sum(other not in expected for other in found) - 1),
                path=path,
                key=names.get(name, name),
            )
        if tuple(shape) != expected[name]:
            turned = " (transposed)" if tuple(shape)[::-1] == expected[name] else ""
            raise TensorMismatch(
                f"{shown} has the wrong shape{turned}",
                path=path,
                key=names.get(name, name),
                expected=list(expected[name]),
                found=list(shape),
            )


def _attention(config: SwitchConfig, start: str) -> Iterator[tuple[str, Shape]]:
    inner = config.num_heads * config.d_kv
    for name in ("q", "k", "v"):
        yield f"{start}.{name}.weight", (inner, config.d_model)
    yield f"{start}.o.weight", (config.d_model, inner)


def _mlp(config: SwitchConfig, start: str, *, sparse: bool) -> Iterator[tuple[str, Shape]]:
    width, hidden = config.d_model, expert_width(config) if sparse else config.d_ff
    if sparse:
        yield f"{start}.router.classifier.weight", (config.num_experts, width)
        if config.router_bias:
            yield f"{start}.router.classifier.bias", (config.num_experts,)
    for name in matrix_names(config):
        shape = (width, hidden) if name == "wo" else (hidden, width)
        if sparse:
            yield f"{start}.experts.{name}", (config.num_experts, *shape)
        else:
            yield f"{start}.{name}.weight", shape


def _more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""
