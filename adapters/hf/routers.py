"""The routers of transformers' sparse models, read as moezoo's records.

Every class of experts behind `@use_experts_implementation` is called with the tokens, the experts
that its router chose and their weights; logits come from whatever beside it returned them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.compiler import is_compiling
from torch.nn import functional as F

from moezoo.adapters.padding import cache_of, modules_around, parameters_of, real_of
from moezoo.errors import NonFiniteInput
from moezoo.ops.eager import is_transformed
from moezoo.recording import Handle, Watched, register_reader
from moezoo.records import Assignment, Routing
from moezoo.routers.base import Router

Seen = Callable[[Routing], None]
_MASK, _TOKENS = "attention_mask", ("input_ids", "inputs_embeds")
# Where PEFT, torch.compile, FSDP and checkpoint_wrapper have what they wrap.
_WRAPPED = ("base_layer", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# The logarithms of scores that routers take of logits, up to a factor per token.
_SCORES: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda logits: logits,  # softmax
    F.logsigmoid,
    lambda logits: 0.5 * F.softplus(logits).clamp(min=1e-30).log(),
)


def sparse_layers(model: nn.Module) -> Mapping[str, Watched]:
    """The sparse layers of transformers in a model, by the name of the module around experts; by
    that of the experts where it holds several.
    """
    found = {name: module for name, module in model.named_modules() if _is_experts(module)}
    around = [_around(name) for name in found]
    return {
        outer if outer and around.count(outer) == 1 else name: SparseLayer(name, model, module)
        for (name, module), outer in zip(found.items(), around, strict=True)
    }


class SparseLayer:
    """A layer whose experts are `experts`; see `moezoo.recording.Watched`."""

    def __init__(self, name: str, model: nn.Module, experts: Any) -> None:
        self.name, self.model, self.experts = name, model, experts
        around = model.get_submodule(_around(name))
        self.beside = [
            part for part in around.children() if not any(map(_is_experts, part.modules()))
        ]
        self.router = ReadRouter(experts)

    def watch(self, seen: Seen, *, checked: bool) -> Iterable[Handle]:
        """Call `seen` with the routing of every call, until the handles are removed."""
        call = _Call(self, seen, checked)
        for _, around in modules_around(self.model, self.name):
            if _MASK in parameters_of(around):
                yield around.register_forward_pre_hook(call.begin, with_kwargs=True, prepend=True)
                break
        yield self.experts.register_forward_pre_hook(call.chosen, with_kwargs=True)
        for part in self.beside:
            yield part.register_forward_hook(call.scored)


class ReadRouter(Router):
    """What a router of transformers is by our words. Its choices, and the module that returned
    logits, whose parameters are its own, are known once it was called.
    """

    choices = 0

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.num_experts = int(experts.num_experts)
        self.d_model = experts.down_proj.shape[-1 if experts.is_transposed else 1]
        self.has_logits = self.has_probs = False
        weight = getattr(experts.config, "router_aux_loss_coef", None)
        self.default_losses = {} if weight is None else {"load_balance": float(weight)}

    def reset_own(self) -> None:
        """Its tensors are the model's."""

    def read_from(self, router: nn.Module) -> None:
        """The module that gives the logits."""
        self.has_logits = self.has_probs = True
        self.scores = router


class _Call:
    """One recording of one layer: what is known of the call that runs."""

    def __init__(self, layer: SparseLayer, seen: Seen, checked: bool) -> None:
        self.layer, self.seen, self.checked = layer, seen, checked
        self.mask: Tensor | None = None
        self.length: int | None = None
        self.found: tuple[Tensor, nn.Module, bool] | None = None
        self.score: int | None = None

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = _given(model, args, kwargs)
        mask = given.get(_MASK)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            self.mask = mask.bool()
        else:
            whole = isinstance(mask, Mapping) or (isinstance(mask, Tensor) and mask.dim() == 4)
            self.mask = real_of(mask, _MASK, cache_of(given)) if whole else None
        new = next((t for name in _TOKENS if (t := given.get(name)) is not None), None)
        self.length = None if new is None else new.shape[1]

    def scored(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Keep logits (T, E) that a module beside the experts returned; one that returns choices
        with them is the router, whatever else has as many columns.
        """
        parts = output if isinstance(output, tuple) else (output,)
        tensors = [part for part in parts if isinstance(part, Tensor)]
        chooses = any(not t.is_floating_point() for t in tensors)
        width = self.layer.router.num_experts
        logits = next((t for t in tensors if t.is_floating_point() and t.shape[-1] == width), None)
        if logits is None or (self.found is not None and self.found[2] and not chooses):
            return
        self.found = logits.reshape(-1, width), module, chooses

    def chosen(self, experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if experts is not self.layer.experts:  # a copy, hooks and all
            return
        x_TD, expert_TK, weight_TK = list(_given(experts, args, kwargs).values())[:3]
        if self.checked:
            self._check(x_TD)
        real, length = self._real(x_TD.shape[0])
        self.layer.router.choices = expert_TK.shape[1]
        with _unseen():
            logits, probs = self._scores(expert_TK, weight_TK)
            pairs = _pairs(expert_TK, weight_TK, real, self.layer.router.num_experts)
        self.seen(Routing(pairs, logits, probs, real=real, proposed=pairs, sequence_length=length))

    def _check(self, x_TD: Tensor) -> None:
        bad = ~torch.isfinite(x_TD).all(-1)
        if bool(bad.any()):
            where, name = bad.nonzero()[0].tolist(), self.layer.name
            reason = f"layer {name!r} got NaN or infinity at position {where}"
            raise NonFiniteInput(reason, field="x")

    def _real(self, num_tokens: int) -> tuple[Tensor | None, int]:
        """Which of the tokens are real, if the model was told, and how many a sequence has."""
        if self.mask is None or not self.mask.shape[0] or num_tokens % self.mask.shape[0]:
            return None, 0
        length = num_tokens // self.mask.shape[0]
        if length > self.mask.shape[1] or length != (self.length or length):  # some tokens alone
            return None, 0
        # Of a cached sequence the last columns are those of the tokens that are new.
        return self.mask[:, self.mask.shape[1] - length :].reshape(-1), length

    def _scores(self, expert_TK: Tensor, weight_TK: Tensor) -> tuple[Tensor | None, Tensor | None]:
        found, self.found = self.found, None
        if found is None or found[0].shape[0] != expert_TK.shape[0]:
            return None, None
        logits_TE = found[0].float()
        self.layer.router.read_from(found[1])
        if self.score is None:
            self.score = _score_of(logits_TE.detach(), expert_TK, weight_TK.detach())
        return logits_TE, _SCORES[self.score or 0](logits_TE).softmax(-1)


def _unseen() -> AbstractContextManager[object]:
    """Where operators save their tensors by themselves: activation checkpointing counts those of a
    block, and recomputes it when recording is over. `torch.func` knows no such hooks.
    """
    plain = is_compiling() or is_transformed()
    return nullcontext() if plain else saved_tensors_hooks(_same, _same)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _given(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a module is called with by name, in its own order."""
    names = parameters_of(module)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return {name: given[name] for name in names if name in given}


def _pairs(expert_TK: Tensor, weight_TK: Tensor, real: Tensor | None, number: int) -> Assignment:
    """First choices first. A weight of 0 is a choice that the model took back."""
    tokens, choices = expert_TK.shape
    expert_N, weight_N = expert_TK.t().reshape(-1), weight_TK.t().reshape(-1).float()
    token_N = torch.arange(tokens, device=expert_N.device).repeat(choices)
    kept_N = (expert_N < number) & (weight_N != 0.0)
    return Assignment(
        token=token_N,
        expert=expert_N.clamp(max=number - 1).long(),
        weight=weight_N,
        kept=kept_N if real is None else kept_N & real[token_N],
        num_tokens=tokens,
        num_experts=number,
        group_size=tokens,
        choices=choices,
        rank_major=True,
    )


@torch.no_grad()
def _score_of(logits_TE: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> int | None:
    """Which score the weights of the chosen experts are proportional to: softmax, sigmoid or the
    root of softplus. Within a token, for some models normalise each; between tokens where they have
    one choice each. No choice of words in configs tells it for all models. None: nor do these.
    """
    dim = 0 if expert_TK.shape[1] == 1 else 1
    weight_TK = weight_TK.float()
    if not weight_TK.numel() or (dim == 0 and bool((weight_TK == weight_TK[:1]).all())):
        return None
    spreads = []
    for score in _SCORES:
        log_TE = logits_TE.log_softmax(-1) if score is _SCORES[0] else score(logits_TE)
        gap_TK = weight_TK.clamp(min=1e-30).log() - log_TE.gather(1, expert_TK)
        gap_TK = torch.where(weight_TK > 0.0, gap_TK, gap_TK.new_full((), float("nan")))
        spread = (gap_TK - gap_TK.nanmean(dim, keepdim=True)).abs()
        spreads.append(float(spread.nan_to_num().mean()))
    return spreads.index(min(spreads))


def _around(name: str) -> str:
    """The name of the module around experts, past what is wrapped around them alone."""
    while name.rpartition(".")[2] in _WRAPPED:
        name = name.rpartition(".")[0]
    return name.rpartition(".")[0]


def _is_experts(module: Any) -> bool:
    """Whether `@use_experts_implementation` made a module's class what it is."""
    return all(hasattr(module, name) for name in ("num_experts", "has_gate", "is_transposed")) and (
        hasattr(type(module), "_apply_gate")
    )


register_reader(sparse_layers)
