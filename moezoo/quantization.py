"""Weights of eight bits: a quarter of the memory, and faster products on a CPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from moezoo.errors import ConfigError
from moezoo.experts import ModuleExperts, StackedExperts, ZeroExperts
from moezoo.experts.base import Experts
from moezoo.functional.drawn import DrawnLinear
from moezoo.functional.shards import refuse_sharded
from moezoo.models.linear import Linear, table_weight
from moezoo.models.switch import SwitchForConditionalGeneration
from moezoo.ops.backends import runs_of
from moezoo.ops.int8 import int8_linear, rounded_rows
from moezoo.ops.observed import is_observed, is_plain
from moezoo.routers.base import Router

_DTYPES = ("int8",)
_TRAINS = "weights of eight bits do not train"


@dataclass(frozen=True)
class Quantization:
    """What `quantize` did.

    quantized: module names. skipped: the reason by name, for every parameter that stayed as it was.
    bytes_before, bytes_after: of all parameters and buffers.
    """

    quantized: tuple[str, ...]
    skipped: Mapping[str, str]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        lines = [
            f"{len(self.quantized)} modules have int8 weights: "
            f"{self.bytes_before / 2**20:,.1f} MiB -> {self.bytes_after / 2**20:,.1f} MiB"
        ]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            lines.append(f"kept {len(names)}: {reason} ({names[0]}{', ...' * (len(names) > 1)})")
        return "\n".join(lines)


class Int8Linear(nn.Module):
    """y = x W^T + b with W rounded row by row; see `moezoo.ops.int8.int8_linear`."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        codes, scale = rounded_rows(weight.detach())
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", codes)
        self.register_buffer("scale", scale[:, 0])
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        _refuse_training(x)
        rows = x if x.dim() == 2 else x.reshape(-1, self.in_features)
        y = int8_linear(rows, self.weight, self.scale)
        y = y if self.bias is None else y + self.bias
        y = y if x.dim() == 2 else y.view(*x.shape[:-1], self.out_features)
        return y if out is None else out.copy_(y)

    def prepared(self, rows: int) -> Int8Linear:
        """Itself; see `moezoo.models.linear.Linear.prepared`."""
        return self

    def add_to(self, total: Tensor, x: Tensor) -> None:
        """total += self(x)."""
        total += self(x)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, int8"


class Int8Experts(Experts):
    """`StackedExperts` with rounded weights."""

    def __init__(self, experts: StackedExperts) -> None:
        super().__init__()
        self.d_model, self.num_experts = experts.d_model, experts.num_experts
        self.function, self.gated = experts.function, experts.gated
        self._names, self.bias = experts.names, experts.bias
        for name in self._names:
            codes, scale = rounded_rows(experts.get_parameter(name).detach())
            self.register_buffer(name, codes)
            self.register_buffer(f"{name}_scale", scale[..., 0])
            if experts.bias:
                self.register_buffer(f"{name}_bias", getattr(experts, f"{name}_bias").detach())

    @property
    def waits(self) -> bool:
        return True  # for the counts

    @property
    def takes_weights(self) -> bool:
        return True

    def forward(self, slots: Tensor, counts: Tensor, weights: Tensor | None = None) -> Tensor:
        _refuse_training(slots)
        out = slots.new_zeros(slots.shape)
        for expert, rows in runs_of(counts):
            hidden = self._hidden(slots[rows], expert)
            if weights is None:
                out[rows] = self._linear("wo", expert, hidden)
                continue
            weight = weights[rows, None].to(hidden.dtype)
            y = self._linear("wo", expert, hidden * weight, biased=False)
            out[rows] = y + weight * self.get_buffer("wo_bias")[expert] if self.bias else y
        return out

    def alone(self, row: Tensor, expert: int) -> Tensor:
        return self._linear("wo", expert, self._hidden(row, expert))

    def _hidden(self, x: Tensor, expert: int) -> Tensor:
        hidden = self.function(self._linear(self._names[0], expert, x))
        return hidden * self._linear("wi_1", expert, x) if self.gated else hidden

    def _linear(self, name: str, expert: int, x: Tensor, *, biased: bool = True) -> Tensor:
        codes, scale = self.get_buffer(name), self.get_buffer(f"{name}_scale")
        y = int8_linear(x, codes[expert], scale[expert])
        return y + self.get_buffer(f"{name}_bias")[expert] if biased and self.bias else y

    def extra_repr(self) -> str:
        return f"{self.num_experts} experts, {self.d_model} wide, int8"


def _refuse_training(x: Tensor) -> None:
    if x.requires_grad:
        raise ConfigError(_TRAINS, field="x", hint="Call the model under torch.no_grad().")


def quantize(model: nn.Module, dtype: str = "int8") -> Quantization:
    """Round the weights of linear maps and stacked experts to eight bits, in place, for inference.

    Every output unit has a scale of its own, and so has every row of the input when it comes:
    "dynamic" quantisation. Routers stay in float32, as do embeddings; a head that is tied to the
    embedding gets a rounded copy. The model is put in evaluation mode and no parameter of it wants
    a gradient any more. `relative_error` says what it cost in accuracy.

    Args:
        model: on the CPU; any module that holds `nn.Linear`, `SparseMLP` or `MoE`.
        dtype: "int8".

    Returns:
        What was quantised, and for every parameter that was not, why.

    Raises ConfigError for another dtype, for a model that is not on the CPU, and where nothing can
    be quantised.
    """
    if dtype not in _DTYPES:
        wanted = " or ".join(repr(name) for name in _DTYPES)
        raise ConfigError("unknown dtype", field="dtype", expected=wanted, found=repr(dtype))
    refuse_sharded(model, "quantising")
    for name, parameter in model.named_parameters():
        if not parameter.is_cpu:
            where = f"{name} on {parameter.device}"
            hint = "Move the model to the CPU first."
            raise ConfigError("int8 is for the CPU", field="model", found=where, hint=hint)
    if is_quantized(model):
        raise ConfigError("the model is quantised already", field="model")
    before = _bytes(model)
    quantized = tuple(_replaced(model))
    if not quantized:
        reason = f"{type(model).__name__} holds no linear map or stacked experts to quantise"
        raise ConfigError(reason, field="model", hint="Pass the module that holds them.")
    if isinstance(model, SwitchForConditionalGeneration) and model.lm_head is None:
        model.lm_head = Int8Linear(table_weight(model.shared))  # type: ignore[assignment]
        quantized = (*quantized, "lm_head")
    model.eval().requires_grad_(False)
    return Quantization(quantized, dict(_kept(model)), before, _bytes(model))


def is_quantized(model: nn.Module) -> bool:
    """Whether some module of the model has rounded weights."""
    return any(isinstance(module, (Int8Linear, Int8Experts)) for module in model.modules())


def relative_error(expected: Tensor, found: Tensor) -> float:
    """`|found - expected| / |expected|`, Euclidean: of logits, hidden states or weights."""
    expected, found = expected.double(), found.double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-300))


def _replaced(model: nn.Module) -> Iterator[str]:
    """Put rounded modules in place, one by one, and yield their names."""
    made: dict[nn.Module, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not name or _reason(model, name) is not None:
            continue
        if is_plain(module, nn.Linear, Linear, DrawnLinear):
            made.setdefault(module, Int8Linear(module.weight, module.bias))
        elif is_plain(module, StackedExperts):
            made.setdefault(module, Int8Experts(module))
        if module in made:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, made[module])
            yield name


def _reason(model: nn.Module, name: str) -> str | None:
    """Why nothing below the modules that hold `name` may be rounded, or None when it may."""
    parts = name.split(".")[:-1]
    for depth in range(len(parts) + 1):
        above = model.get_submodule(".".join(parts[:depth]))
        if isinstance(above, Router):
            return "routers decide in float32"
        if isinstance(above, Experts) and type(above) not in (ModuleExperts, ZeroExperts):
            return f"{type(above).__name__} uses its weights in a way of its own"
    return None


def _kept(model: nn.Module) -> Iterator[tuple[str, str]]:
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        reason = _reason(model, name)
        if reason is not None:
            yield name, reason
        elif is_observed(owner):
            yield name, f"{type(owner).__name__} has hooks or a forward that rounding would lose"
        elif isinstance(owner, nn.Embedding):
            yield name, "an embedding is looked up, not multiplied"
        elif parameter.dim() < 2:
            yield name, "a vector costs no product"
        else:
            yield name, f"{type(owner).__name__} is not known here"


def _bytes(model: nn.Module) -> int:
    tensors: dict[int, Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        tensors[tensor.data_ptr()] = tensor
    return sum(t.numel() * t.element_size() for t in tensors.values())
