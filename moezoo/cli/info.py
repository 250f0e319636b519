"""`moezoo info`: what a model costs, before anything is allocated."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("model", help="a name of `moezoo list`, or a checkpoint directory")
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence (512)")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Print the table."""
    from moezoo.cost import BYTES, cost
    from moezoo.errors import ConfigError

    if arguments.length < 1:
        raise ConfigError("--length is at least 1", field="length", found=arguments.length)
    config = _config(arguments.model)
    router = config.router if isinstance(config.router, dict) else {"name": config.router}
    choices = int(router.get("k", 2 if router["name"] in ("top_k", "gshard") else 1))
    total = cost(config, choices=choices, length=arguments.length)
    facts: dict[str, Any] = {
        "parameters": total.parameters,
        "active_parameters": total.active,
        "expert_parameters": total.expert_parameters,
        "flops_per_token": total.flops_per_token,
        "bytes": {name: total.bytes(name) for name in BYTES},
        "num_experts": config.num_experts,
        "encoder_sparse_layers": list(config.encoder_sparse),
        "decoder_sparse_layers": list(config.decoder_sparse),
        "router": router,
        "capacity": config.capacity or "switch",
        "feed_forward": config.feed_forward_proj,
    }
    print(json.dumps(facts, indent=2) if arguments.json else _table(arguments, facts))
    return 0


def _config(model: str) -> Any:
    from moezoo.presets import preset

    if Path(model).exists():
        from moezoo.adapters.checkpoint import read_config

        return read_config(model)
    return preset(model)


def _table(arguments: argparse.Namespace, facts: dict[str, Any]) -> str:
    from moezoo.cli.terminal import quantity, table

    layers = {
        side: ", ".join(map(str, facts[f"{side}_sparse_layers"])) or "none"
        for side in ("encoder", "decoder")
    }
    capacity = facts["capacity"]
    rows = [
        ("parameters", f"{facts['parameters']:,}"),
        ("active per token", f"{facts['active_parameters']:,}"),
        ("in experts", f"{facts['expert_parameters']:,}"),
        (f"FLOPs per token, length {arguments.length}", quantity(facts["flops_per_token"])),
        *((f"bytes in {name}", quantity(size) + "B") for name, size in facts["bytes"].items()),
        ("experts per sparse layer", facts["num_experts"]),
        ("sparse encoder layers", layers["encoder"]),
        ("sparse decoder layers", layers["decoder"]),
        (
            "router",
            json.dumps(facts["router"]) if len(facts["router"]) > 1 else facts["router"]["name"],
        ),
        ("capacity", _capacity(capacity)),
        ("feed-forward", facts["feed_forward"]),
    ]
    return table([arguments.model, ""], rows)


def _capacity(spec: Any) -> str:
    if spec == "switch":
        return "switch: factor 1.25 in training, dropless in evaluation"
    return spec if isinstance(spec, str) else json.dumps(spec)
