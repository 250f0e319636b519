"""`moezoo verify`: is an upcycled model what its recipe says, and does it compute the same?"""

from __future__ import annotations

import argparse
import json

from moezoo.errors import ConfigError

NOT_VERIFIED = 1


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("target", metavar="OUT", help="the upcycled checkpoint")
    parser.add_argument("--against", metavar="SRC", required=True, help="the dense one it was")
    parser.add_argument(
        "--levels",
        default="1,2,3,4,5",
        help="1 static, 2 bytes, 3 layers, 4 logits, 5 routers (all); 1 and 2 need no torch, 4 of "
        "a decoder needs transformers",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Print the verdict; exit code 0 when verified, 1 when not."""
    from moezoo.adapters.verify import verify

    verification = verify(
        arguments.target, arguments.against, levels=_levels(arguments.levels)
    )  # fmt: skip
    print(json.dumps(verification.to_dict(), indent=2) if arguments.json else verification.line)
    return 0 if verification.passed else NOT_VERIFIED


def _levels(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and len(word) == 1 for word in words):
        raise ConfigError(
            "--levels is a list of numbers", field="levels", expected="1 to 5", found=text[:80]
        )
    return [int(word) for word in words]
