"""Dense models of transformers, tiny: how each is made, and where its MLPs are."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

_SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "pad_token_id": 0,
}
_KEYS = {**_SIZES, "num_key_value_heads": 2}
_HEADS = {**_KEYS, "head_dim": 8}
_GPT2 = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2}
_ENDS = {"bos_token_id": 1, "eos_token_id": 1}
_T5 = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 2}
_BART = {
    "vocab_size": 50,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_OPT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "ffn_dim": 32,
    "word_embed_proj_dim": 16,
}
_VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 8,
    "patch_size": 4,
}
_WHISPER = {**_BART, "num_mel_bins": 8, "max_source_positions": 6}
_LAYER, _MLP, _BLOCK, _FEW = (
    r".*layer\.\d+",
    r".*layers\.\d+\.mlp",
    r"h\.\d+\.mlp",
    r".*layers\.\d+",
)

# Name of the model in transformers: options of its config, and which modules are plugged.
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "Bert": (_SIZES, _LAYER),
    "Roberta": (_SIZES, _LAYER),
    "Electra": ({**_SIZES, "embedding_size": 16}, _LAYER),
    "MPNet": (_SIZES, _LAYER),
    "Esm": (_SIZES, _LAYER),
    "Albert": ({**_SIZES, "embedding_size": 16}, r".*albert_layers\.\d+"),
    "DistilBert": (
        {"vocab_size": 50, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
        r".*\.ffn",
    ),
    "XLM": ({"vocab_size": 50, "emb_dim": 16, "n_layers": 2, "n_heads": 2}, r"ffns\.\d+"),
    "ModernBert": ({**_SIZES, "global_attn_every_n_layers": 1}, _MLP),
    "NomicBert": (_SIZES, _MLP),
    "CLIPText": ({**_SIZES, "max_position_embeddings": 20}, _MLP),
    "GPT2": ({**_GPT2, **_ENDS}, _BLOCK),
    "GPTBigCode": ({**_GPT2, **_ENDS}, _BLOCK),
    "GPTNeo": (
        {
            "vocab_size": 50,
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 2,
            "attention_types": [[["global"], 2]],
            **_ENDS,
        },
        _BLOCK,
    ),
    "GPTJ": ({**_GPT2, **_ENDS, "rotary_dim": 4}, _BLOCK),
    "CodeGen": ({**_GPT2, **_ENDS, "n_embd": 32, "n_head": 4, "rotary_dim": 4}, _BLOCK),
    "GPTNeoX": (_SIZES, _MLP),
    "Bloom": ({"vocab_size": 50, "hidden_size": 16, "n_layer": 2, "n_head": 2}, _BLOCK),
    "Mpt": ({"vocab_size": 50, "d_model": 16, "n_layers": 2, "n_heads": 2}, r"blocks\.\d+\.ffn"),
    "Falcon": (
        {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
        _BLOCK,
    ),
    "Llama": (_KEYS, _MLP),
    "Mistral": (_KEYS, _MLP),
    "Qwen2": (_KEYS, _MLP),
    "Qwen3": (_HEADS, _MLP),
    "Gemma": (_HEADS, _MLP),
    "Gemma2": (_HEADS, _MLP),
    "Gemma3Text": (_HEADS, _MLP),
    "Phi": (_SIZES, _MLP),
    "Phi3": (_KEYS, _MLP),
    "StableLm": (_KEYS, _MLP),
    "Starcoder2": (_KEYS, _MLP),
    "Cohere": (_KEYS, _MLP),
    "Olmo": (_KEYS, _MLP),
    "Olmo2": (_KEYS, _MLP),
    "Granite": (_KEYS, _MLP),
    "Glm": (_HEADS, _MLP),
    "Nemotron": (_KEYS, _MLP),
    "Persimmon": (_SIZES, _MLP),
    "SmolLM3": (_KEYS, _MLP),
    "Helium": (_HEADS, _MLP),
    "Exaone4": (_HEADS, _MLP),
    "OPT": (_OPT, r"decoder\.layers\.\d+"),
    "BioGpt": (_SIZES, _FEW),
    "Bart": (_BART, _FEW),
    "MBart": (_BART, _FEW),
    "Pegasus": (_BART, _FEW),
    "M2M100": (_BART, _FEW),
    "Marian": (_BART, _FEW),
    "T5": ({**_T5, "decoder_start_token_id": 0}, r".*DenseReluDense"),
    "MT5": ({**_T5, "decoder_start_token_id": 0}, r".*DenseReluDense"),
    "ViT": (_VIT, _MLP),
    "Whisper": (_WHISPER, _FEW),
}
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


def made(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model whose MLPs matter, in evaluation."""
    torch.manual_seed(0)
    options, _ = MODELS[name]
    config = getattr(transformers, f"{name}Config")(**options)
    model: nn.Module = getattr(transformers, f"{name}Model")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype)


def called(name: str, model: nn.Module) -> Tensor:
    """The last hidden states of real tokens."""
    ids = torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(1))
    config: Any = model.config
    dtype = next(model.parameters()).dtype
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": MASK}
    if name == "ViT":
        pixels = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)
        arguments = {"pixel_values": pixels.to(dtype)}
    if name == "Whisper":
        arguments = {"input_features": torch.linspace(-1, 1, 2 * 8 * 12).view(2, 8, 12).to(dtype)}
    if getattr(config, "is_encoder_decoder", False):
        arguments["decoder_input_ids"] = ids
    y: Tensor = model(**arguments)[0]
    return y[MASK.bool()] if set(arguments) == {"input_ids", "attention_mask"} else y
