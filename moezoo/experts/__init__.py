"""Expert containers: E functions over rows that are sorted by expert. One file per container."""

from moezoo.experts.base import Experts, registry
from moezoo.experts.stacked import StackedExperts

register = registry.register
names = registry.names
build = registry.build

__all__ = ["Experts", "StackedExperts", "build", "names", "register", "registry"]
