"""Router losses: unweighted scalars of a routing. One file per loss."""

from moezoo.losses.base import RouterLoss, registry
from moezoo.losses.importance import ImportanceLoss
from moezoo.losses.l1 import L1Loss
from moezoo.losses.load import LoadLoss
from moezoo.losses.load_balance import LoadBalanceLoss
from moezoo.losses.z import ZLoss

register = registry.register
names = registry.names
build = registry.build

__all__ = [
    "ImportanceLoss",
    "L1Loss",
    "LoadBalanceLoss",
    "LoadLoss",
    "RouterLoss",
    "ZLoss",
    "build",
    "names",
    "register",
    "registry",
]
