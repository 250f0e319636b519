"""Tensor names, both ways: Hugging Face's T5 and Switch layouts, and moezoo's modules.

One table of templates is read in both directions. Stacked expert weights (E, ...) are one tensor in
memory and one per expert on disk. What a template does not name inside an MLP (other routers,
shared experts, other containers) keeps its name under `mlp.` in the moezoo layout. No torch here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from moezoo.errors import TensorMismatch, nearest

DENSE_T5 = "DenseReluDense"  # what the MLP of a dense block is called in T5's layout
SWITCH = "mlp"  # and in Switch's

_ATTENTION = ("q", "k", "v", "o")
_TEMPLATES: list[tuple[str, str]] = [
    ("shared.weight", "shared.weight"),
    ("lm_head.weight", "lm_head.weight"),
    ("encoder.embed_tokens.weight", "encoder.embed_tokens.weight"),
    ("decoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
]
for _stack, _mlp in (("encoder", 1), ("decoder", 2)):
    _ours, _theirs = f"{_stack}.blocks.#.", f"{_stack}.block.#.layer."
    _TEMPLATES += [
        (f"{_ours}attention.{w}.weight", f"{_theirs}0.SelfAttention.{w}.weight") for w in _ATTENTION
    ]
    _TEMPLATES += [
        (
            f"{_ours}attention.position_bias.weight",
            f"{_theirs}0.SelfAttention.relative_attention_bias.weight",
        ),
        (f"{_ours}attention_norm.weight", f"{_theirs}0.layer_norm.weight"),
        (f"{_ours}mlp_norm.weight", f"{_theirs}{_mlp}.layer_norm.weight"),
        (f"{_stack}.final_norm.weight", f"{_stack}.final_layer_norm.weight"),
    ]
    _TEMPLATES += [
        (f"{_ours}mlp.{w}.weight", f"{_theirs}{_mlp}.@.{w}.weight")
        for w in ("wi", "wi_0", "wi_1", "wo")
    ]
_TEMPLATES += [
    (
        f"decoder.blocks.#.cross_attention.{w}.weight",
        f"decoder.block.#.layer.1.EncDecAttention.{w}.weight",
    )
    for w in _ATTENTION
]
_TEMPLATES.append(
    ("decoder.blocks.#.cross_norm.weight", "decoder.block.#.layer.1.layer_norm.weight")
)

_TO_DISK = dict(_TEMPLATES)
_TO_MEMORY = {disk: memory for memory, disk in _TEMPLATES}
SHARED = "shared.weight"
HEAD = "lm_head.weight"
TABLES = {stack: f"{stack}.embed_tokens.weight" for stack in ("encoder", "decoder")}
MAY_REPEAT = (*TABLES.values(), HEAD)  # what a file may hold as a copy of the shared embeddings
LM_HEADS = (HEAD, "decoder.lm_head.weight")
_STRAY = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
_BLOCK = re.compile(r"(encoder|decoder)\.block\.(\d{1,5})\.layer\.(\d)\.(.+)\Z")
_OUR_MLP = re.compile(r"(encoder|decoder)\.blocks\.(\d+)\.mlp\.(.+)\Z")
_OTHER_HEAD = re.compile(r"(?!lm_head\.)(?:\w*head|classifier|qa_outputs|regressor|score)\.")
_EXPERT = re.compile(r"experts\.expert_(\d{1,7})\.(wi|wi_0|wi_1|wo)\.weight\Z")
_STACKED = re.compile(r"experts\.(wi|wi_0|wi_1|wo)\Z")
_MLP_LAYER = {"encoder": "1", "decoder": "2"}


@dataclass(frozen=True)
class MemoryName:
    """Where a tensor on disk belongs: a parameter's name, and the expert for one slice of a
    stack.
    """

    name: str
    expert: int | None = None


def expert_axis(name: str) -> int:
    """The axis of a tensor of a router along which its experts are."""
    return 1 if name.endswith(".correction") else 0


def is_stray(name: str) -> bool:
    """Whether a tensor on disk never meant anything: T5's first files hold one."""
    return name == _STRAY


def is_head(name: str) -> bool:
    """Whether a tensor beside the stacks is of a head that moezoo's models do not have: a
    classifier's, a span's (`qa_outputs`), a value's.
    """
    return _OTHER_HEAD.match(name) is not None


def memory_name(name: str) -> MemoryName:
    """The place of a tensor on disk. Raises TensorMismatch for a name that is not of the family."""
    if name in LM_HEADS:
        return MemoryName(HEAD)
    block = _BLOCK.match(name)
    if block is None:
        if name in _TO_MEMORY:
            return MemoryName(_TO_MEMORY[name])
        raise _unknown(name)
    stack, index, sub, rest = block.groups()
    generic = f"{stack}.block.#.layer.{sub}.{rest}"
    generic = generic.replace(f".{DENSE_T5}.", ".@.")
    if sub == _MLP_LAYER[stack] and rest.startswith(f"{SWITCH}."):
        inner = rest.removeprefix(f"{SWITCH}.")
        expert = _EXPERT.match(inner)
        if expert:
            return MemoryName(f"{stack}.blocks.{index}.mlp.experts.{expert[2]}", int(expert[1]))
        return MemoryName(f"{stack}.blocks.{index}.mlp.{inner}")
    if generic not in _TO_MEMORY:
        raise _unknown(name)
    return MemoryName(_TO_MEMORY[generic].replace("#", index))


def disk_names(name: str, *, mlp: str, num_experts: int = 0) -> list[str]:
    """The names on disk of a parameter: one, or one per expert for a stack.

    Args:
        mlp: what the layout calls a block's MLP, DENSE_T5 or SWITCH.
    """
    inner = _OUR_MLP.match(name)
    if inner:
        stack, index, rest = inner.groups()
        start = f"{stack}.block.{index}.layer.{_MLP_LAYER[stack]}.{mlp}."
        stacked = _STACKED.match(rest)
        if stacked:
            return [f"{start}experts.expert_{e}.{stacked[1]}.weight" for e in range(num_experts)]
        return [start + rest]
    index_match = re.search(r"\.blocks\.(\d+)\.", name)
    generic = re.sub(r"\.blocks\.\d+\.", ".blocks.#.", name)
    if generic not in _TO_DISK:
        raise TensorMismatch(f"the parameter {name!r} has no name on disk", key=name)
    return [_TO_DISK[generic].replace("#", index_match[1] if index_match else "")]


def common_prefix(names: Iterable[str]) -> str:
    """What stands before the family's names in a file of a larger model, such as
    `text_encoders.t5xxl.transformer.`; empty in a file of its own. A prefix that only some of the
    family's tensors carry is none.
    """
    for name in names:
        match = re.match(r"(.*?)(?:encoder|decoder)\.block\.\d+\.layer\.", name)
        if match:
            return match[1]
    return ""


def _unknown(name: str) -> TensorMismatch:
    shown = name if len(name) <= 120 else name[:117] + "..."
    known = [disk.replace("#", "0").replace("@", DENSE_T5) for disk in _TO_MEMORY]
    match = nearest(name, known) if len(name) < 120 else None
    hint = f"Did you mean {match!r}?" if match else None
    return TensorMismatch(f"unexpected tensor {shown!r}", key=shown, hint=hint)
