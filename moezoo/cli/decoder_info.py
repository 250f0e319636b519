"""What `moezoo info` says of a decoder of transformers, by its headers alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

_BYTES = {"float32": 4, "bfloat16": 2}


def decoder_facts(name: str, *, drop_heads: bool) -> dict[str, Any] | None:
    """Numbers of a decoder's directory; None for anything else. Raises as `open_checkpoint`.

    `active_parameters` are those that one token meets: of the experts, as many as it chooses.
    """
    if not Path(name).exists():
        return None
    from moezoo.adapters.decoder_description import describe_decoder
    from moezoo.adapters.families.decoders import decoder_shapes
    from moezoo.adapters.formats import open_source

    with open_source(name) as source:
        description = describe_decoder(source, drop_heads=drop_heads)
    if description is None:
        return None
    config = description.config
    sizes = {name: math.prod(shape) for name, shape in decoder_shapes(config)}
    total, experts = sum(sizes.values()), sum(s for n, s in sizes.items() if ".mlp.experts." in n)
    chosen = experts * config.choices // config.num_experts if config.num_experts else 0
    return {
        "model_type": config.model_type,
        "parameters": total,
        "active_parameters": total - experts + chosen,
        "expert_parameters": experts,
        "bytes": {name: total * size for name, size in _BYTES.items()},
        "num_experts": config.num_experts,
        "experts_per_token": config.choices,
        "sparse_layers": list(config.decoder_sparse),
        "shared_expert": config.shares,
        "feed_forward": config.feed_forward_proj,
    }


def decoder_table(title: str, facts: dict[str, Any]) -> str:
    """The facts for a human reader."""
    from moezoo.cli.terminal import quantity, table

    sparse = [
        ("in experts", f"{facts['expert_parameters']:,}"),
        ("experts per sparse layer", facts["num_experts"]),
        ("experts per token", facts["experts_per_token"]),
        ("sparse layers", ", ".join(map(str, facts["sparse_layers"])) or "none"),
        ("shared expert", "yes" if facts["shared_expert"] else "no"),
    ]
    rows = [
        ("model", f"decoder, {facts['model_type']}"),
        ("parameters", f"{facts['parameters']:,}"),
        ("active per token", f"{facts['active_parameters']:,}"),
        *((f"bytes in {name}", quantity(size) + "B") for name, size in facts["bytes"].items()),
        ("feed-forward", facts["feed_forward"]),
        *(sparse if facts["num_experts"] else [("experts", "none: a dense model")]),
    ]
    return table([title, ""], rows)
