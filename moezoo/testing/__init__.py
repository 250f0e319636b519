"""The conformance kit: does a router, policy, container, loss or layer keep its promises?

    from moezoo.testing import check_router
    check_router(MyRouter)

Each check draws inputs with hypothesis and verifies every invariant that the component's declared
properties imply. A broken one raises `InvariantBroken`, which says which promise, how it was broken
and the smallest input that breaks it. Needs the package hypothesis.
"""

from moezoo.errors import ConfigError

try:
    import hypothesis  # noqa: F401
except ImportError:
    raise ConfigError(
        "moezoo.testing needs hypothesis", field="hypothesis", hint="pip install hypothesis"
    ) from None

from moezoo.testing.experts import check_experts
from moezoo.testing.invariants import Case, InvariantBroken
from moezoo.testing.layers import check_layer
from moezoo.testing.losses import check_loss
from moezoo.testing.policies import check_policy
from moezoo.testing.routers import check_router
from moezoo.testing.strategies import cases, routings, token_batches

__all__ = [
    "Case",
    "InvariantBroken",
    "cases",
    "check_experts",
    "check_layer",
    "check_loss",
    "check_policy",
    "check_router",
    "routings",
    "token_batches",
]
