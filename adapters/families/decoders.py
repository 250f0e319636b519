"""Decoders as a family: names on disk and shapes by the tables, and config.json both ways."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from moezoo.adapters.families.base import Family, ModelConfig, Weights
from moezoo.adapters.families.decoder_checks import read_decoder
from moezoo.adapters.families.decoder_config import DecoderConfig, is_dense
from moezoo.adapters.families.dense_decoders import DENSE
from moezoo.adapters.families.dense_kind import DenseKind
from moezoo.adapters.families.sparse_decoders import SPARSE, Fused, SparseKind
from moezoo.adapters.fused import Whole, part_name, place_of, slice_name
from moezoo.adapters.names import HEAD, SHARED
from moezoo.adapters.shapes import Shape
from moezoo.errors import TensorMismatch
from moezoo.frozen import thawed

EMBEDDINGS = "model.embed_tokens.weight"
_LAYER = re.compile(r"decoder\.blocks\.(\d+)\.(.+)\Z")
_STRAY = re.compile(
    r"model\.(?:layers\.\d+\.self_attn\.)?rotary_emb\.(?:inv_freq|cos_cached|sin_cached)\Z"
)
MATRICES = ("wi_0", "wi_1", "wo")
# Of a written config.json: what is the writer's, not the model's.
_WRITERS = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "model_type",
    "torch_dtype",
    "transformers_version",
)


class DecoderFamily(Family):
    """One `model_type` of a decoder, dense or sparse.

    In memory, names are those of a T5's decoder wherever the verbs ask for a part by name: the
    embeddings, the head, the norm before an MLP, the MLP and what is in it.
    """

    mlp = ""

    def __init__(self, model_type: str, *, dense: bool = False) -> None:
        self.model_types = (model_type,)
        self.sparse: SparseKind | None = None if dense else SPARSE.get(model_type)
        self.dense: DenseKind = DENSE[self.sparse.dense if self.sparse else model_type]

    @property
    def title(self) -> str:
        kind = self.dense if self.sparse is None else self.sparse
        return kind.architecture.removesuffix("ForCausalLM")

    def read(self, values: Mapping[str, Any], weights: Weights) -> Any:
        return read_decoder(values)

    def write(self, config: Any, task: str) -> dict[str, Any]:
        values: dict[str, Any] = thawed(config.values)
        return values

    def refusal(self, config: ModelConfig) -> str | None:
        return None

    def is_stray(self, name: str) -> bool:
        """What old files hold of RoPE, and the config tells."""
        return _STRAY.match(name) is not None

    def disk_names(self, name: str, *, num_experts: int = 0) -> list[str]:
        """The names on disk of a parameter: one, or one per expert for a stack."""
        if name in (SHARED, HEAD):
            return [EMBEDDINGS if name == SHARED else HEAD]
        match = _LAYER.match(name)
        if match is None:
            return [self._sliced(name)]
        start, inner = f"model.layers.{match[1]}.", match[2]
        if inner == "mlp_norm.weight":
            return [f"{start}{self.dense.mlp_norm}.weight"]
        part, matrix = inner.removeprefix("mlp."), inner.removesuffix(".weight").rpartition(".")[2]
        kind = self.sparse
        if kind is None or part == f"{matrix}.weight":
            return [self._sliced(f"{start}{self.dense.mlp}.{self.dense.matrix[matrix]}.weight")]
        if part.startswith("shared."):
            shared = kind.shared[matrix]
            if isinstance(shared, Fused):
                return [slice_name(start + shared.name, shared.part, shared.parts)]
            return [start + shared]
        if part.startswith("router."):
            extra = part.removeprefix("router.").removesuffix(".weight")
            return [start + (kind.router if extra == "classifier" else kind.zeros[extra][0])]
        form = kind.expert[matrix]
        if isinstance(form, Fused):
            whole = start + form.name
            return [part_name(whole, e, form.part, form.parts) for e in range(num_experts)]
        return [start + form.format(e=expert) for expert in range(num_experts)]

    def _sliced(self, name: str) -> str:
        """The name on disk, if need be of a part of a tensor that holds several matrices."""
        for whole, parts in self.dense.fused.items() if self.sparse is None else ():
            for number, part in enumerate(parts):
                if name.endswith(f".{part}"):
                    return slice_name(name.removesuffix(part) + whole, number, len(parts))
        return name

    def shapes(self, config: Any, task: str) -> dict[str, Shape]:
        """The shape of every parameter by its name in memory; experts are stacked (E, ...)."""
        return dict(decoder_shapes(config))

    def fused(self, config: DecoderConfig) -> dict[str, Whole]:
        """Tensors that hold all experts of a layer, or several matrices of a dense one."""
        if self.sparse is None:
            return self._fused_matrices(config)
        found: dict[str, Whole] = {}
        for layer in config.decoder_sparse:
            for matrix, form in self.sparse.expert.items():
                if isinstance(form, Fused):
                    rows, columns = _matrix(matrix, config.d_model, config.expert_d_ff)
                    shape = (config.num_experts, form.parts * rows, columns)
                    whole = f"model.layers.{layer}.{form.name}"
                    found[whole] = Whole((rows,) * form.parts, shape)
            for form in self.sparse.shared.values():
                if isinstance(form, Fused):
                    rows = int(config.full[self.sparse.shared_width])
                    found[f"model.layers.{layer}.{form.name}"] = Whole(
                        (rows,) * form.parts, (form.parts * rows, config.d_model)
                    )
        return found

    def _fused_matrices(self, config: DecoderConfig) -> dict[str, Whole]:
        found: dict[str, Whole] = {}
        for name, shape in decoder_shapes(config) if self.dense.fused else ():
            place = place_of(*self.disk_names(name))
            if place is not None:
                before = found[place.whole].rows if place.number else ()
                rows = (*before, shape[0])
                found[place.whole] = Whole(rows, (sum(rows), *shape[1:]))
        return found

    def module(self, layer: str) -> str:
        """The name of a layer's MLP among the modules of transformers' dense model."""
        match = _LAYER.match(layer)
        assert match is not None
        return f"model.layers.{match[1]}.{self.dense.mlp}"


def decoder_family(values: Mapping[str, Any]) -> DecoderFamily | None:
    """The family of a decoder's config.json, None for another."""
    model_type = values.get("model_type")
    known = isinstance(model_type, str) and (model_type in DENSE or model_type in SPARSE)
    return DecoderFamily(str(model_type), dense=is_dense(values)) if known else None


def family_for(config: DecoderConfig) -> DecoderFamily:
    """The family that a decoder is written in."""
    return DecoderFamily(config.model_type, dense=config.sparse_kind is None)


def own_values(config: DecoderConfig) -> dict[str, Any]:
    """What the model means by its config.json, without what the writer says of the file."""
    return {name: value for name, value in config.full.items() if name not in _WRITERS}


def decoder_shapes(config: DecoderConfig) -> Iterator[tuple[str, Shape]]:
    """Every parameter by its name in memory, with its shape."""
    kind, width, sparse = config.dense_kind, config.d_model, config.decoder_sparse
    yield SHARED, (config.vocab_size, width)
    for layer in range(config.num_layers):
        start = f"model.layers.{layer}."
        for name, shape in _mixer_shapes(config, layer).items():
            yield start + name, shape
        for name, (shape, _) in filled(config).items():
            yield start + name, shape
        for norm in kind.norms:
            if norm == kind.mlp_norm:
                yield f"decoder.blocks.{layer}.mlp_norm.weight", (width,)
            else:
                yield f"{start}{norm}.weight", (width,)
        yield from _mlp_shapes(config, f"decoder.blocks.{layer}.mlp", sparse=layer in sparse)
    yield f"{kind.last_norm}.weight", (width,)
    if not config.tied:
        yield HEAD, (config.vocab_size, width)


def _mixer_shapes(config: DecoderConfig, layer: int) -> dict[str, Shape]:
    full, kind = config.full, config.dense_kind
    if kind.mixer is not None:
        return kind.mixer(full, layer)
    tensors = {**kind.tensors, **(kind.biased if full.get("attention_bias") else {})}
    return {name: _sized(config, letters) for name, letters in tensors.items()}


def filled(config: DecoderConfig) -> dict[str, tuple[Shape, float]]:
    """What each layer of a sparse model has that its dense one lacks, and the number in it."""
    fills = {} if config.sparse_kind is None else config.dense_kind.fills
    return {name: (_sized(config, letters), value) for name, (letters, value) in fills.items()}


def constant_of(config: ModelConfig, name: str) -> float:
    """The number in a tensor that a sparse model has and its dense one lacks; 0 for any other."""
    fills = filled(config) if isinstance(config, DecoderConfig) else {}
    return next((value for end, (_, value) in fills.items() if name.endswith(end)), 0.0)


def _sized(config: DecoderConfig, letters: str) -> Shape:
    full = config.full
    heads, one = full["num_attention_heads"], full["head_dim"]
    sizes = {"D": config.d_model, "V": config.vocab_size, "N": heads, "H": one, "Q": heads * one,
             "K": full["num_key_value_heads"] * one}  # fmt: skip
    return tuple(sizes[letter] for letter in letters)


def _mlp_shapes(config: DecoderConfig, start: str, *, sparse: bool) -> Iterator[tuple[str, Shape]]:
    width, kind = config.d_model, config.sparse_kind
    if not sparse or kind is None:
        hidden = config.d_ff if kind is None else int(config.full[kind.dense_width])
        for matrix in MATRICES:
            yield f"{start}.{matrix}.weight", _matrix(matrix, width, hidden)
        return
    yield f"{start}.router.classifier.weight", (config.num_experts, width)
    for name, shape in zero_shapes(kind, config).items():
        yield f"{start}.router.{name}", shape
    for matrix in MATRICES:
        shape = _matrix(matrix, width, config.expert_d_ff)
        yield f"{start}.experts.{matrix}", (config.num_experts, *shape)
    for matrix in kind.shared:
        hidden = int(config.full[kind.shared_width])
        yield f"{start}.shared.{matrix}.weight", _matrix(matrix, width, hidden)


def zero_shapes(kind: SparseKind, config: DecoderConfig) -> dict[str, Shape]:
    """The further tensors of a sparse layer's router, zero at first, with their shapes."""
    sizes = {"1": 1, "D": config.d_model, "E": config.num_experts}
    return {
        name: tuple(sizes[letter] for letter in letters)
        for name, (_, letters) in kind.zeros.items()
    }


def _matrix(name: str, width: int, hidden: int) -> tuple[int, int]:
    return (width, hidden) if name == "wo" else (hidden, width)


def lost_field(config: DecoderConfig, error: TensorMismatch) -> TensorMismatch:
    """The error of weights that are not what config.json says, with the fields that say it where
    there is no nearer way out.
    """
    if error.hint:
        return error
    names = ["hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
             "head_dim", "vocab_size", "num_hidden_layers", "tie_word_embeddings",
             "attention_bias", *config.dense_kind.numbers, "q_lora_rank"]  # fmt: skip
    if error.key == HEAD and not config.tied and error.found is None:
        names = ["tie_word_embeddings"]  # what it tells of every size is of no use there
    told = ", ".join(f"{name} {config.full[name]}" for name in names if name in config.full)
    return TensorMismatch(
        error.message, path=error.path, key=error.key, expected=error.expected, found=error.found,
        hint=f"config.json says {told}: correct it, or download both again.",
    )  # fmt: skip
