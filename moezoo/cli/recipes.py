"""The flags of a recipe, shared by `plan`, `upcycle` and `merge`. Flags win over a recipe file."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from moezoo.errors import ConfigError

if TYPE_CHECKING:
    from moezoo.adapters.upcycle.recipe import Recipe

_FIELDS = (
    "num_experts",
    "layers",
    "init",
    "preserve",
    "router",
    "router_init",
    "capacity",
    "seed",
    "dtype",
    "max_shard_size",
)


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that make a recipe."""
    add = parser.add_argument
    add("--recipe", metavar="FILE", help="a TOML or JSON recipe; flags win over it")
    add("--experts", dest="num_experts", metavar="E", type=_count, help="experts per sparse layer")
    add("--layers", help="all (default; odd of a T5), odd, last:6, every:2, enc=1,3;dec=all, ...")
    add("--init", help="copy (default), noise:1e-3, drop:0.5, split, virtual_group:2, lora:8")
    add("--preserve", choices=("exact", "none"), help="exact: same function as the source")
    add("--router", type=_component, help="top_k:2 (default; switch of a T5), or JSON")
    add("--router-init", help="normal (default), zero, mean_orthogonal, centroids, prompts")
    add("--capacity", type=_component, help="dropless (default), switch, or JSON")
    add("--seed", type=int, help="of every random number (0)")
    add("--dtype", help="float32, bfloat16 or float16; default: the source's")
    add("--max-shard-size", help="such as 5GB (default)")
    add("--layout", default="auto", help="auto (default), huggingface or moezoo")


def add_drop_heads(parser: argparse.ArgumentParser) -> None:
    """The flag that lets a head be left out, which moezoo's models do not have."""
    parser.add_argument(
        "--drop-heads", action="store_true", help="leave out a classifier or another trained head"
    )


def recipe_from(arguments: argparse.Namespace) -> Recipe:
    """The recipe of a command line. Raises ConfigError naming the flag."""
    from moezoo.adapters.upcycle.recipe import Recipe, read_values

    values: dict[str, Any] = read_values(arguments.recipe) if arguments.recipe else {}
    given = {name: getattr(arguments, name, None) for name in _FIELDS}
    values.update({name: value for name, value in given.items() if value is not None})
    if "num_experts" not in values:
        raise ConfigError("--experts is missing", field="num_experts", hint="Such as --experts 8.")
    return Recipe.from_dict(values)


def _count(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _component(text: str) -> str | dict[str, Any]:
    """A component as a name, `top_k:2`, or JSON."""
    if not text.startswith("{"):
        return text
    try:
        values = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise argparse.ArgumentTypeError("not a JSON object")
    return values
