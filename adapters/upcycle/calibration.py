"""What the layers of a dense model read on sample text, for routers that are fitted to it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moezoo.adapters.families import DecoderConfig
from moezoo.adapters.families.decoders import family_for
from moezoo.adapters.formats.files import read_start
from moezoo.adapters.names import SHARED
from moezoo.errors import ConfigError, TokenizerError
from moezoo.text_files import texts

if TYPE_CHECKING:
    from torch import Tensor, nn

    from moezoo.adapters.checkpoint_source import CheckpointSource

    LayerInputs = Mapping[str, "LayerSample"]
else:
    LayerInputs = Mapping
_MAX_TOKENS = 8192
_MAX_FILE = 1 << 20
_MAX_SAMPLES, _MAX_LENGTH = 256, 512
INPUTS = ("model", "embeddings")


@dataclass(frozen=True)
class Calibration:
    """Sample token ids: sequences for the encoder; the decoder reads the same ones.

    `experts` names the expert that each sequence is a prompt of (for `prompts`), or is None; -1 - e
    says that the sequence is of what expert e is not for.
    `device` is where a model from disk reads them; a live model reads them where it is.
    `inputs` says what stands for a layer's input: "model", what it is when the dense model reads
    the sequences (a decoder through transformers), or "embeddings", the rows of the table of tokens
    in every layer, which needs neither.
    """

    sequences: Sequence[Sequence[int]]
    experts: Sequence[int] | None = None
    device: str = "cpu"
    inputs: str = "model"

    def __post_init__(self) -> None:
        if not self.sequences or not all(self.sequences):
            raise ConfigError("calibration needs sequences of token ids", field="calibration")
        if self.inputs not in INPUTS:
            raise ConfigError(
                "unknown inputs", field="inputs", expected=" or ".join(INPUTS),
                found=repr(self.inputs)[:80],
            )  # fmt: skip
        if self.experts is not None and len(self.experts) != len(self.sequences):
            raise ConfigError(
                "calibration needs one expert per sequence",
                field="calibration",
                expected=len(self.sequences),
                found=len(self.experts),
            )

    def sha256(self) -> str:
        """A digest of the ids, for the provenance."""
        experts = None if self.experts is None else list(self.experts)
        ids = [list(sequence) for sequence in self.sequences]
        facts = [ids, experts] if self.inputs == "model" else [ids, experts, self.inputs]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@dataclass(frozen=True)
class LayerSample:
    """What one layer reads: inputs (T, D) float32, and the expert of each token (T,), as
    `Calibration` names it, or None.
    """

    inputs: Tensor
    experts: Tensor | None = None


def read_calibration(
    file: str | Path, directory: Path, *, device: str = "cpu", inputs: str = "model"
) -> Calibration:
    """Sample text from a file, by the tokenizer in the checkpoint directory, for a device.

    Text files hold one sample per line; JSONL, CSV and TSV files one per row, as "text". Of these,
    the first 256 are taken. JSON files hold a list with one list per expert, of texts or of lists
    of token ids (which need no tokenizer), or an object {"positive": [...], "negative": [...]} of
    two such lists. Of a sample, the first 512 tokens are taken. Raises ConfigError or
    CheckpointError.
    """
    path = Path(file).expanduser()
    if path.suffix.lower() != ".json":
        samples = (text for _, text in texts(path, field="text") if text.strip())
        to_ids = _encoder(directory)
        ids = [to_ids(text)[:_MAX_LENGTH] for text in islice(samples, _MAX_SAMPLES)]
        return Calibration(ids, device=device, inputs=inputs)
    content = read_start(path, _MAX_FILE + 1)
    if len(content) > _MAX_FILE:
        found = f"<= {_MAX_FILE} bytes"
        raise ConfigError("too large for prompts", field="calibration", path=path, expected=found)
    try:
        values = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        values = None
    groups = values if isinstance(values, list) else []
    if not groups or not all(map(_is_group, groups)):
        raise ConfigError(
            f"{file}: prompts cannot be read",
            field="calibration",
            expected="a JSON list with one list per expert, of texts or of lists of ids, or with "
            "an object of two such lists, positive and negative",
        )
    prompts = [pair for expert, group in enumerate(groups) for pair in _signed(expert, group)]
    to_encode = any(isinstance(prompt, str) for _, prompt in prompts)
    encode = _encoder(directory) if to_encode else None
    ids = [encode(p) if encode and isinstance(p, str) else list(p) for _, p in prompts]
    experts = [expert for expert, _ in prompts]
    return Calibration([sequence[:_MAX_LENGTH] for sequence in ids], experts, device, inputs)


def layer_inputs(
    checkpoint: CheckpointSource, calibration: Calibration | None, layers: Sequence[str]
) -> dict[str, LayerSample]:
    """The inputs of the named MLPs of a dense checkpoint.

    Holds the dense model in memory, or its table of tokens. Raises ConfigError without sample text,
    and for a decoder where transformers is not installed.
    """
    if calibration is None:
        raise ConfigError(
            "this router initialisation needs sample text",
            field="calibration",
            hint="Pass calibration (--calibration FILE), or use router_init='normal'.",
        )
    _check_ids(calibration, checkpoint.config.vocab_size)
    if calibration.inputs == "embeddings":
        return dict.fromkeys(layers, _embedded(checkpoint, calibration))
    if isinstance(checkpoint.config, DecoderConfig):
        from moezoo.adapters.verify_decoder import load_transformers

        family = family_for(checkpoint.config)
        decoder, _ = load_transformers(
            checkpoint, purpose="what the layers of a decoder read", device=calibration.device,
            without="--inputs embeddings",
        )  # fmt: skip
        modules = {layer: family.module(layer) for layer in layers}
        found = collected_inputs(decoder, calibration, list(modules.values()))
        return {layer: found[module] for layer, module in modules.items()}
    from moezoo.adapters.checkpoint import load

    dropped = bool(checkpoint.description.dropped)
    model = load(checkpoint.path, drop_heads=dropped, device=calibration.device)
    return collected_inputs(model, calibration, layers)


def collected_inputs(
    model: nn.Module, calibration: Calibration, layers: Sequence[str]
) -> dict[str, LayerSample]:
    """The inputs of the named modules of a live model on sample text, in evaluation; on the CPU."""
    import torch

    device = next(model.parameters()).device
    training = [module for module in model.modules() if module.training]
    found: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    handles = []
    for layer in layers:
        store = found[layer]

        def keep(_: nn.Module, arguments: tuple[Tensor, ...], store: list[Tensor] = store) -> None:
            store.append(arguments[0].detach().reshape(-1, arguments[0].shape[-1]).float().cpu())

        handles.append(model.get_submodule(layer).register_forward_pre_hook(keep))
    try:
        model.eval()  # dropout would be part of the sample
        with torch.no_grad():
            for sequence in calibration.sequences:
                ids = torch.tensor([list(sequence)], device=device)
                if hasattr(model, "encoder") and hasattr(model, "decoder"):
                    model(ids, decoder_input_ids=ids)
                else:
                    model(ids)
    finally:
        for module in training:
            module.training = True
        for handle in handles:
            handle.remove()
    return {layer: _sample(inputs, calibration) for layer, inputs in found.items()}


def _check_ids(calibration: Calibration, rows: int) -> None:
    largest = max(max(sequence) for sequence in calibration.sequences)
    if largest >= rows:
        raise ConfigError(
            "calibration holds an id that the model has no row for", field="calibration",
            expected=f"ids below {rows}", found=largest,
        )  # fmt: skip


def _embedded(checkpoint: CheckpointSource, calibration: Calibration) -> LayerSample:
    """The rows of the table of tokens that the sequences name."""
    import torch

    table = checkpoint.source.tensor(checkpoint.tensors[SHARED][0].name)
    rows = [table[torch.tensor(list(s), device="cpu")].float() for s in calibration.sequences]
    return _sample(rows, calibration)


def _signed(expert: int, group: Any) -> Iterator[tuple[int, Any]]:
    """The prompts of an expert, and those of what it is not for, by the number that says so."""
    parts = group if isinstance(group, dict) else {"positive": group}
    yield from ((expert, prompt) for prompt in parts["positive"])
    yield from ((-1 - expert, prompt) for prompt in parts.get("negative", ()))


def _is_group(group: Any) -> bool:
    """A list of prompts, or an object of a positive one and perhaps a negative one."""
    parts = group if isinstance(group, dict) else {"positive": group}
    named = "positive" in parts and set(parts) <= {"positive", "negative"}
    return named and all(isinstance(p, list) and all(map(_is_prompt, p)) for p in parts.values())


def _sample(inputs: list[Tensor], calibration: Calibration) -> LayerSample:
    """All tokens, or as many as are allowed, spread evenly."""
    import torch

    joined, experts = torch.cat(inputs), None
    if calibration.experts is not None:
        counts = torch.tensor([len(part) for part in inputs], device="cpu")
        experts = torch.tensor(list(calibration.experts), device="cpu").repeat_interleave(counts)
    if len(joined) > _MAX_TOKENS:
        chosen = torch.arange(_MAX_TOKENS, device="cpu") * len(joined) // _MAX_TOKENS
        joined = joined[chosen]
        experts = None if experts is None else experts[chosen]
    return LayerSample(joined, experts)


def _is_prompt(value: Any) -> bool:
    """A text that is not empty, or a list of token ids."""
    if isinstance(value, str):
        return bool(value.strip())
    ids = isinstance(value, list) and bool(value)
    return ids and all(type(i) is int and 0 <= i < 2**31 for i in value)


def _encoder(directory: Path) -> Callable[[str], list[int]]:
    """Text to ids, by the tokenizer beside a checkpoint."""
    from moezoo.tokenizer import tokenizer_of

    try:
        return tokenizer_of(directory).encode
    except TokenizerError as error:
        raise ConfigError(
            f"calibration needs the tokenizer beside the source: {error.message}",
            field="calibration",
            path=directory,
            hint="Put tokenizer.json or spiece.model there, or pass token ids in a JSON file.",
        ) from None
