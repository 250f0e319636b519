"""Experts and models on several ranks, by torch.distributed: meshes, styles, shards, gradients."""

from moezoo.functional.collective import traffic
from moezoo.parallel.gradients import clip_grad_norm, mean_gradients
from moezoo.parallel.lost import guard, join, leave
from moezoo.parallel.meshes import mesh
from moezoo.parallel.sharding import shard
from moezoo.parallel.style import ExpertParallel, expert_parallel, plan

__all__ = [
    "ExpertParallel",
    "clip_grad_norm",
    "expert_parallel",
    "guard",
    "join",
    "leave",
    "mean_gradients",
    "mesh",
    "plan",
    "shard",
    "traffic",
]
