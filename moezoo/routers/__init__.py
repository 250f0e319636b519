"""Routers: which experts see which tokens, and with what weight. One file per router."""

from moezoo.routers.base import Router, registry
from moezoo.routers.base_layers import BaseLayersRouter
from moezoo.routers.cosine import CosineRouter
from moezoo.routers.expert_choice import ExpertChoiceRouter
from moezoo.routers.expert_threshold import ExpertThresholdRouter
from moezoo.routers.gshard import GShardRouter
from moezoo.routers.hash import HashRouter
from moezoo.routers.noisy_top_k import NoisyTopKRouter
from moezoo.routers.random import RandomRouter
from moezoo.routers.relu import ReLURouter
from moezoo.routers.sigmoid_top_k import SigmoidTopKRouter
from moezoo.routers.sinkhorn import SinkhornRouter
from moezoo.routers.soft import SoftRouter
from moezoo.routers.streamed_switch import StreamedSwitchRouter
from moezoo.routers.switch import SwitchRouter
from moezoo.routers.top_k import TopKRouter

register = registry.register
names = registry.names
build = registry.build

__all__ = [
    "BaseLayersRouter",
    "CosineRouter",
    "ExpertChoiceRouter",
    "ExpertThresholdRouter",
    "GShardRouter",
    "HashRouter",
    "NoisyTopKRouter",
    "RandomRouter",
    "ReLURouter",
    "Router",
    "SigmoidTopKRouter",
    "SinkhornRouter",
    "SoftRouter",
    "StreamedSwitchRouter",
    "SwitchRouter",
    "TopKRouter",
    "build",
    "names",
    "register",
    "registry",
]
