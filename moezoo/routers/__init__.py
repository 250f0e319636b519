"""Routers: which experts see which tokens, and with what weight. One file per router."""

from moezoo.routers.base import Router, registry
from moezoo.routers.switch import SwitchRouter
from moezoo.routers.top_k import TopKRouter

register = registry.register
names = registry.names
build = registry.build

__all__ = ["Router", "SwitchRouter", "TopKRouter", "build", "names", "register", "registry"]
