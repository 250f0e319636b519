"""Expert containers: E functions over rows that are sorted by expert. One file per container."""

from moezoo.experts.base import Experts, registry
from moezoo.experts.feed_forward import FeedForward
from moezoo.experts.lora import LoraExperts
from moezoo.experts.modules import ModuleExperts
from moezoo.experts.shared import SharedExpert
from moezoo.experts.stacked import StackedExperts
from moezoo.experts.zero import ZeroExperts

register = registry.register
names = registry.names
build = registry.build

__all__ = [
    "Experts",
    "FeedForward",
    "LoraExperts",
    "ModuleExperts",
    "SharedExpert",
    "StackedExperts",
    "ZeroExperts",
    "build",
    "names",
    "register",
    "registry",
]
