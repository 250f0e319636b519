"""`moezoo list`: the models that `build` knows."""

from __future__ import annotations

import argparse
import json


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("pattern", nargs="?", default="*", help='such as "switch-*"')
    parser.add_argument("--json", action="store_true", help="a JSON list")


def run(arguments: argparse.Namespace) -> int:
    """Print the names, one a line; nothing found is exit code 2."""
    from moezoo.errors import ConfigError
    from moezoo.presets import list_models

    names = list_models(arguments.pattern)
    if not names:
        hint = "`moezoo list` shows all."
        raise ConfigError(f"no model matches {arguments.pattern!r}", field="pattern", hint=hint)
    print(json.dumps(names) if arguments.json else "\n".join(names))
    return 0
