"""Router losses: unweighted scalars of a routing. One file per loss."""

from moezoo.losses.base import RouterLoss, registry
from moezoo.losses.load_balance import LoadBalanceLoss
from moezoo.losses.z import ZLoss

register = registry.register
names = registry.names
build = registry.build

__all__ = ["LoadBalanceLoss", "RouterLoss", "ZLoss", "build", "names", "register", "registry"]
