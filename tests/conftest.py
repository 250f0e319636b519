"""Hypothesis profiles: dev and mutants 25 examples, ci 200, nightly 100,000; HYPOTHESIS_PROFILE
picks one. Those of mutants and ci are the same in every run.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

_SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.data_too_large]

for _name, _examples in (("dev", 25), ("mutants", 25), ("ci", 100), ("nightly", 100_000)):
    settings.register_profile(
        _name,
        max_examples=_examples,
        deadline=None,  # shared machines stall; a time limit here would fail at random
        derandomize=_name in ("mutants", "ci"),
        print_blob=True,
        suppress_health_check=_SLOW_IS_FINE,
    )
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))
