"""A cache of the hub's client that holds stand-ins for the checkpoints that the tests name."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub.constants
import peft
import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

BASE = "hf-internal-testing/tiny-random-OPTForCausalLM"
ENCODER = "hf-internal-testing/tiny-random-BertModel"
ADAPTER = "peft-internal-testing/tiny-OPTForCausalLM-lora"
BY_REVISION = "peft-internal-testing/tiny-opt-lora-revision"
_PULL_REQUEST = "refs/pr/2"


@contextlib.contextmanager
def hub(place: Path, whole: Any, encoder: Any) -> Iterator[None]:
    """The hub's client reads a cache below `place` and nothing else."""
    base = functools.partial(_base, whole)
    _repository(place, BASE, {"main": base, _PULL_REQUEST: base})
    _repository(place, ENCODER, {"main": encoder.save_pretrained})
    whole.name_or_path = BASE  # what an adapter's file says that it is for
    whole.add_adapter(peft.LoraConfig(init_lora_weights=False))

    def adapter(folder: Path) -> None:
        whole.save_pretrained(folder)
        _as_pickle(folder / "adapter_model.safetensors", "adapter_model.bin")

    _repository(place, ADAPTER, {"main": adapter, _PULL_REQUEST: adapter})
    below = {"main": lambda folder: adapter(folder / "test_subfolder")}
    _repository(place, BY_REVISION, {**below, "test": adapter})
    constants = huggingface_hub.constants
    with mock.patch.multiple(constants, HF_HUB_CACHE=str(place), HF_HUB_OFFLINE=True):
        yield


def _repository(place: Path, name: str, revisions: dict[str, Callable[[Path], None]]) -> None:
    folder = place / f"models--{name.replace('/', '--')}"
    for number, (revision, save) in enumerate(revisions.items(), 1):
        commit = f"{number:040x}"
        reference = folder / "refs" / revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit)
        (folder / "snapshots" / commit).mkdir(parents=True)
        save(folder / "snapshots" / commit)
        for absent in {"adapter_config.json", "config.json"} - _names(
            folder / "snapshots" / commit
        ):
            marker = folder / ".no_exist" / commit / absent
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _as_pickle(file: Path, name: str) -> None:
    torch.save(load_file(file), file.with_name(name))


def _base(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    _as_pickle(folder / "model.safetensors", "pytorch_model.bin")
    letters = {chr(32 + i): 3 + i for i in range(90)}
    found = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, **letters}, "<unk>"))
    found.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=found, **special).save_pretrained(folder)
