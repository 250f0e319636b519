"""What a decoder's checkpoint on disk is: where each of its tensors goes. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moezoo.adapters.description import Description, named_file, same_bytes
from moezoo.adapters.families import DecoderConfig, DecoderFamily, Weights, decoder_family
from moezoo.adapters.families.decoders import EMBEDDINGS, lost_field
from moezoo.adapters.foreign import refuse_foreign_tensors, refuse_plugged
from moezoo.adapters.formats import Source
from moezoo.adapters.formats.files import quoted, read_json
from moezoo.adapters.fused import split_fused
from moezoo.adapters.names import HEAD, is_head
from moezoo.errors import ConfigError, TensorMismatch, nearest

_MAX_CONFIG_BYTES = 1 << 20
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", ".base_layer")
Places = dict[str, dict[int | None, str]]


def describe_decoder(source: Source, *, drop_heads: bool = False) -> Description | None:
    """Read config.json and place every tensor; None for a checkpoint that is no known decoder.

    Raises ConfigError naming the field, or TensorMismatch for tensors that are not what it says.
    """
    path = source.directory / "config.json"
    values = read_json(path, most=_MAX_CONFIG_BYTES) if path.is_file() else {}
    named_file(path, refuse_plugged, values)
    family = decoder_family(values)
    if family is None:
        return None
    config = named_file(path, family.read, values, Weights(frozenset(), own_head=False))
    refuse_foreign_tensors(source.tensors, source.path, known="Llama or its kin")
    try:
        _refuse_size(source, "num_hidden_layers", config.num_layers)
        fused = family.fused(config)
        _refuse_memory(source, fused)
        split_fused(source, fused)
        _refuse_size(source, "num_experts", len(config.decoder_sparse) * config.num_experts)
        return _described(source, family, config, values, drop_heads=drop_heads)
    except TensorMismatch as error:
        raise lost_field(config, error) from None


def _described(
    source: Source,
    family: DecoderFamily,
    config: DecoderConfig,
    values: Mapping[str, Any],
    *,
    drop_heads: bool,
) -> Description:
    known = _by_disk_name(family, config)
    places: Places = {}
    aliases: dict[str, str] = {}
    dropped: list[str] = []
    for name in source.tensors:
        if name in known:
            parameter, expert = known[name]
            places.setdefault(parameter, {})[expert] = name
        elif name == HEAD and config.tied:
            _check_tied(source)
            aliases[HEAD] = EMBEDDINGS
        elif is_head(name):
            dropped.append(name)
        elif not family.is_stray(name):
            raise TensorMismatch(
                f"unexpected tensor {quoted(name)}", path=source.path, key=name[:120],
                hint=_meant(name, known, source, family),
            )  # fmt: skip
    if dropped and not config.tied and HEAD not in source.tensors:
        raise TensorMismatch(
            f"a head such as {quoted(dropped[0])} and none for tokens", path=source.path,
            key=HEAD, hint=f"Weights of another class: {_other_class(family)}",
        )  # fmt: skip
    if dropped and not drop_heads:
        raise TensorMismatch(
            f"the sparse model has no head such as {quoted(dropped[0])} ({len(dropped)} tensors)",
            path=source.path, key=dropped[0],
            hint="Leave it out with --drop-heads, in Python with drop_heads=True.",
        )  # fmt: skip
    return Description(family, config, "", places, aliases, tuple(dropped), (), True, values)


def _meant(
    name: str, known: Mapping[str, object], source: Source, family: DecoderFamily
) -> str | None:
    """The name that a strange one may stand for: of those that a file lacks, where it lacks as many
    as it has too many.
    """
    if f"model.{name}" in known:
        return f"A save of the base class alone: {_other_class(family)}"
    if around := _wrapper(name, known):
        return (
            f"Names with {around!r} are of a wrapper (DDP, FSDP, torch.compile, peft) or a larger "
            "model: save the one inside with save_pretrained."
        )
    strange = [n for n in source.tensors if n not in known and not family.is_stray(n)]
    lacking = [n for n in known if n not in source.tensors]
    near = len(name) < 120 and len(strange) <= len(lacking)
    match = nearest(name, lacking[:500]) if near else None
    return f"Did you mean {match!r}?" if match else None


def _wrapper(name: str, known: Mapping[str, object]) -> str:
    """What a wrapper has put before, or into, the name of a tensor that is known without."""
    for inside in _WRAPPERS:
        if name.replace(inside, "") in known:
            return inside
    parts = name.split(".")
    cut = next((i for i in range(1, len(parts)) if ".".join(parts[i:]) in known), 0)
    return ".".join([*parts[:cut], ""]) if cut else ""


def _other_class(family: DecoderFamily) -> str:
    kind = family.dense if family.sparse is None else family.sparse
    return (
        f"load it with transformers' {kind.architecture}, "
        "which makes a new head where that is not tied, and save that."
    )


def _by_disk_name(
    family: DecoderFamily, config: DecoderConfig
) -> dict[str, tuple[str, int | None]]:
    """The parameter, and the expert for one slice of a stack, of every name on disk."""
    known: dict[str, tuple[str, int | None]] = {}
    for parameter in family.shapes(config, "conditional_generation"):
        names = family.disk_names(parameter, num_experts=config.num_experts)
        stacked = ".mlp.experts." in parameter
        known |= {n: (parameter, e if stacked else None) for e, n in enumerate(names)}
    return known


def _refuse_size(source: Source, field: str, number: int) -> None:
    """Refuse absurd numbers before the names of all tensors are made: they must not cost time or
    memory.
    """
    if number > len(source.tensors):
        raise TensorMismatch(
            f"{field}: config.json names more of them than the checkpoint has weights",
            path=source.path, key=field, found=number,
        )  # fmt: skip


def _refuse_memory(source: Source, fused: Mapping[str, object]) -> None:
    """Refuse experts by the names that they have in a model that transformers has loaded."""
    ends = (".experts.gate_up_proj", ".experts.down_proj")
    name = next((n for n in source.tensors if n.endswith(ends) and n not in fused), None)
    if name is not None:
        raise TensorMismatch(
            f"{quoted(name)} holds experts as transformers has them in memory", path=source.path,
            key=name[:120], hint="Load it, m; new = AutoModelForCausalLM.from_config(m.config); "
            "new.load_state_dict(m.state_dict()); new.save_pretrained(OUT) has published names.",
        )  # fmt: skip


def _check_tied(source: Source) -> None:
    if not same_bytes(source, HEAD, EMBEDDINGS):
        raise ConfigError(
            f"tie_word_embeddings is true, and {HEAD} differs from {EMBEDDINGS}",
            field="tie_word_embeddings", path=source.directory / "config.json",
            hint="Correct config.json, or leave the head out of the weights.",
        )  # fmt: skip
