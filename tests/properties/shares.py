"""How many examples a property runs: all of the profile's in `nightly`, else a share of them."""

from __future__ import annotations

from hypothesis import settings

NIGHTLY = 100_000


def share(part: int, least: int) -> int:
    """One `part`-th of the profile's examples, at least `least`, where checks are many and time is
    short; 10^5 in `nightly`.
    """
    examples = settings().max_examples
    return examples if examples >= NIGHTLY else max(least, examples // part)
