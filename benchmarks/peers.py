"""moezoo and transformers models that compute the same function, for side-by-side timing."""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import nn

import moezoo

_RULES = [
    (r"\.block\.", ".blocks."),
    (r"\.layer\.0\.SelfAttention\.relative_attention_bias\.", ".attention.position_bias."),
    (r"\.layer\.0\.SelfAttention\.", ".attention."),
    (r"\.layer\.0\.layer_norm\.", ".attention_norm."),
    (r"\.layer\.1\.EncDecAttention\.", ".cross_attention."),
    (r"decoder(.*)\.layer\.1\.layer_norm\.", r"decoder\1.cross_norm."),
    (r"\.layer\.[12]\.layer_norm\.", ".mlp_norm."),
    (r"\.layer\.[12]\.mlp\.", ".mlp."),
    (r"\.final_layer_norm\.", ".final_norm."),
    (r"(encoder|decoder)\.embed_tokens", "shared"),
    (r"lm_head", "shared"),
]


def ours(name: str = "switch-base-8") -> nn.Module:
    """A model with random weights that drops no token."""
    torch.manual_seed(0)
    return moezoo.build(name, seed=0, capacity="dropless", router_losses={})


def theirs(model: nn.Module) -> nn.Module:
    """transformers' model on the very same memory, with a capacity that never binds."""
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    config = model.config
    with torch.device("meta"):
        peer = SwitchTransformersForConditionalGeneration(
            SwitchTransformersConfig(
                vocab_size=config.vocab_size,
                d_model=config.d_model,
                d_kv=config.d_kv,
                d_ff=config.d_ff,
                num_layers=config.num_layers,
                num_decoder_layers=config.decoder_layers,
                num_heads=config.num_heads,
                num_experts=config.num_experts,
                num_sparse_encoder_layers=len(config.encoder_sparse),
                num_sparse_decoder_layers=len(config.decoder_sparse),
                expert_capacity=1_000_000,
                dropout_rate=config.dropout_rate,
                decoder_start_token_id=0,
            )
        )
    weights = dict(model.named_parameters())
    for name, parameter in list(peer.named_parameters(remove_duplicate=False)):
        owner, _, leaf = name.rpartition(".")
        shared = nn.Parameter(_weight(name, weights).detach())
        assert shared.shape == parameter.shape, name
        setattr(peer.get_submodule(owner), leaf, shared)
    peer.tie_weights()
    return peer.eval()


def _weight(name: str, weights: dict[str, nn.Parameter]) -> torch.Tensor:
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    expert = re.match(r"(.*\.experts)\.expert_(\d+)\.(wi|wo)\.weight", name)
    return weights[f"{expert[1]}.{expert[3]}"][int(expert[2])] if expert else weights[name]


def interleaved(
    runs: dict[str, Callable[[], object]], *, repeats: int = 7
) -> dict[str, list[float]]:
    """Seconds of each run, taken in turns after one warm-up each."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if round_number:
                times[name].append(time.perf_counter() - start)
    return times


def report(what: str, times: dict[str, list[float]], unit: float, label: str) -> str:
    """One Markdown row: median (min) of both in `label`s of `unit` seconds, and their ratio."""
    mine, peer = times["moezoo"], times["transformers"]
    cells = [f"{median(t) / unit:.1f} ({min(t) / unit:.1f})" for t in (mine, peer)]
    ratio = f"{median(peer) / median(mine):.2f} ({min(peer) / min(mine):.2f})"
    row = f"| {what} | {label} | {cells[0]} | {cells[1]} | {ratio} |"
    print(row, flush=True)
    return row


def peak_mib() -> float:
    """The most memory that this process has ever held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
