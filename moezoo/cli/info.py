"""`moezoo info`: what a model costs, before anything is allocated."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from moezoo.cli.recipes import add_drop_heads
from moezoo.config import SwitchConfig

KINDS = {
    "conditional_generation": "encoder and decoder",
    "model": "encoder and decoder, no head",
    "encoder": "encoder alone",
}
_LENGTH = 512


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("model", help="a name of `moezoo list`, or a checkpoint directory")
    parser.add_argument("--length", type=int, help="tokens per sequence (512), for FLOPs")
    add_drop_heads(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Print the table."""
    from moezoo.cli.decoder_info import decoder_facts, decoder_table
    from moezoo.cost import BYTES, cost
    from moezoo.errors import ConfigError

    given = arguments.length
    if given is not None and given < 1:
        raise ConfigError("--length is at least 1", field="length", found=given)
    decoder = decoder_facts(arguments.model, drop_heads=arguments.drop_heads)
    if decoder is not None:
        if given is not None:
            reason = "--length is for FLOPs, which are not counted of a decoder"
            raise ConfigError(reason, field="length", found=given, hint="Leave it out.")
        table = decoder_table(arguments.model, decoder)
        print(json.dumps(decoder, indent=2) if arguments.json else table)
        return 0
    arguments.length = _LENGTH if given is None else given
    config, task = model_of(arguments.model, drop_heads=arguments.drop_heads)
    router = config.router if isinstance(config.router, dict) else {"name": config.router}
    total = cost(config, task=task, length=arguments.length)
    policy = "dropless" if total.bounds_load else "switch"
    facts: dict[str, Any] = {
        "task": task,
        "parameters": total.parameters,
        "active_parameters": total.active,
        "expert_parameters": total.expert_parameters,
        "flops_per_token": total.flops_per_token,
        "bytes": {name: total.bytes(name) for name in BYTES},
        "num_experts": config.num_experts,
        "encoder_sparse_layers": list(config.encoder_sparse),
        "decoder_sparse_layers": [] if task == "encoder" else list(config.decoder_sparse),
        "router": router,
        "capacity": config.capacity or policy,
        "feed_forward": config.feed_forward_proj,
        "own_embeddings": list(config.own_embeddings),
    }
    print(json.dumps(facts, indent=2) if arguments.json else _table(arguments, facts))
    return 0


def model_of(name: str, *, drop_heads: bool = False) -> tuple[SwitchConfig, str]:
    """Config and task of a preset, or of a checkpoint by its headers alone."""
    from moezoo.presets import preset

    if not Path(name).exists():
        return preset(name), "conditional_generation"
    from moezoo.adapters.checkpoint_source import task_of
    from moezoo.adapters.description import describe
    from moezoo.adapters.formats import open_source

    with open_source(name) as source:
        description = describe(source, drop_heads=drop_heads)
    return description.config, task_of(description)


def _table(arguments: argparse.Namespace, facts: dict[str, Any]) -> str:
    from moezoo.cli.terminal import quantity, table

    rows = [
        ("model", KINDS[facts["task"]]),
        ("parameters", f"{facts['parameters']:,}"),
        ("active per token", f"{facts['active_parameters']:,}"),
        (f"FLOPs per token, length {arguments.length}", quantity(facts["flops_per_token"])),
        *((f"bytes in {name}", quantity(size) + "B") for name, size in facts["bytes"].items()),
        ("feed-forward", facts["feed_forward"]),
        *(("embeddings", f"the {stack}'s own") for stack in facts["own_embeddings"]),
        *(_sparse_rows(facts) if facts["num_experts"] else [("experts", "none: a dense model")]),
    ]
    return table([arguments.model, ""], rows)


def _sparse_rows(facts: dict[str, Any]) -> list[tuple[str, object]]:
    router = facts["router"]
    layers = {
        side: ", ".join(map(str, facts[f"{side}_sparse_layers"])) or "none"
        for side in ("encoder", "decoder")
    }
    return [
        ("in experts", f"{facts['expert_parameters']:,}"),
        ("experts per sparse layer", facts["num_experts"]),
        ("sparse encoder layers", layers["encoder"]),
        ("sparse decoder layers", layers["decoder"]),
        ("router", json.dumps(router) if len(router) > 1 else router["name"]),
        ("capacity", _capacity(facts["capacity"])),
    ]


def _capacity(spec: Any) -> str:
    if spec == "switch":
        return "switch: factor 1.25 in training, dropless in evaluation"
    return spec if isinstance(spec, str) else json.dumps(spec)
