"""Capacity policies: which of the proposed pairs are computed. One file per policy."""

from moezoo.capacity.base import CapacityPolicy, registry
from moezoo.capacity.batch_priority import BatchPriority
from moezoo.capacity.dropless import Dropless
from moezoo.capacity.first_come import FirstCome
from moezoo.capacity.random_order import RandomOrder
from moezoo.capacity.reroute import Reroute
from moezoo.capacity.switch import SwitchCapacity
from moezoo.capacity.transformers import TransformersCapacity

register = registry.register
names = registry.names
build = registry.build

__all__ = [
    "BatchPriority",
    "CapacityPolicy",
    "Dropless",
    "FirstCome",
    "RandomOrder",
    "Reroute",
    "SwitchCapacity",
    "TransformersCapacity",
    "build",
    "names",
    "register",
    "registry",
]
