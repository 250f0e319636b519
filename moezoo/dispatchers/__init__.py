"""Dispatchers: how rows reach experts on other ranks, and come back. One file per dispatcher."""

from moezoo.dispatchers.allgather import AllGatherDispatcher
from moezoo.dispatchers.alltoall import AllToAllDispatcher
from moezoo.dispatchers.base import Dispatcher, registry

register = registry.register
names = registry.names
build = registry.build

__all__ = [
    "AllGatherDispatcher",
    "AllToAllDispatcher",
    "Dispatcher",
    "build",
    "names",
    "register",
    "registry",
]
