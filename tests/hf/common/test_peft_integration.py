"""The wrapped models pass the tests of transformers' integration of PEFT, in the place of an OPT.

They are in a checkout of transformers alone: `mixins` says how to name one.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from moezoo.adapters.hf import (
    MoezooConfig,
    MoezooEncoderModel,
    MoezooForConditionalGeneration,
    register,
)

from .families import FAMILIES, SIZES
from .mixins import PEFT, has, load

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs

if not has(PEFT):
    pytest.skip("TRANSFORMERS_TESTS names no folder with them", allow_module_level=True)
peft = pytest.importorskip("peft")
pytest.importorskip("datasets", reason="transformers' tests of PEFT need datasets")

from .hub import hub  # noqa: E402  # needs PEFT

_OTHER = "about the checkpoint of another architecture"
NOT_APPLICABLE = {
    "test_peft_load_adapter_applies_user_key_mapping": _OTHER,
    "test_peft_load_adapter_non_moe_conversion_mapped_model": _OTHER,
    "test_mixtral_lora_conversion": _OTHER,
    "test_peft_pipeline_no_warning": "the pipeline warns of every encoder-decoder, T5 included",
    "test_prefix_tuning_trainer_load_best_model_at_end_error": (
        "about a classifier of texts; T5's takes no prefixes either"
    ),
}


def as_encoder_decoder(kind: Any) -> Any:
    """Their tests call a decoder-only model: its ids are those of both stacks."""
    plain = kind.forward

    @functools.wraps(plain)
    def forward(self: Any, input_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not args and not {"labels", "decoder_input_ids"} & set(kwargs):
            kwargs["decoder_input_ids"] = input_ids
        return plain(self, input_ids, *args, **kwargs)

    return mock.patch.object(kind, "forward", forward)


def lora(**options: Any) -> Any:
    """A LoraConfig whose modules go by T5's names."""
    if isinstance(names := options.get("target_modules"), list):
        options["target_modules"] = [name.removesuffix("_proj") for name in names]
    return _LoraConfig(**options)


_LoraConfig = peft.LoraConfig


def standing_in(name: str, case: Any, module: Any, whole: Any, encoder: Any) -> Any:
    """One of their classes, with the models of `whole()` and `encoder()` in the place of theirs."""

    class Tests(case):  # type: ignore[misc]
        @classmethod
        def setUpClass(cls) -> None:
            stack = contextlib.ExitStack()
            cls.addClassCleanup(stack.close)
            place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            model = whole()
            kind = cls.transformers_test_model_classes = (AutoModelForSeq2SeqLM, type(model))
            names = dict(zip(("AutoModelForCausalLM", "OPTForCausalLM"), kind, strict=True))
            stack.enter_context(hub(place, model, encoder()))
            stack.enter_context(mock.patch.multiple(module, **names))
            stack.enter_context(mock.patch.object(peft, "LoraConfig", lora))
            stack.enter_context(as_encoder_decoder(type(model)))

        def setUp(self) -> None:
            torch.manual_seed(0)
            if reason := NOT_APPLICABLE.get(self._testMethodName):
                self.skipTest(reason)

    Tests.__name__ = Tests.__qualname__ = name
    return Tests


def _models(family: str) -> tuple[Any, Any]:
    def made(kind: Any, **more: Any) -> Any:
        sizes = {**SIZES, "initializer_factor": 0.1}  # their tests want adapters to be seen
        return kind(MoezooConfig(**sizes, **FAMILIES[family], **more)).eval()

    return (
        functools.partial(made, MoezooForConditionalGeneration),
        functools.partial(made, MoezooEncoderModel, is_encoder_decoder=False),
    )


_module = load(PEFT)
register()  # once they are imported, which replaces the module "transformers"
for _family in FAMILIES:
    for _case in (_module.PeftIntegrationTester, _module.PeftHotswapIntegrationTest):
        _name = f"{_family.capitalize()}{'Hotswap' if 'Hotswap' in _case.__name__ else 'Peft'}"
        globals()[_name] = standing_in(_name, _case, _module, *_models(_family))
del _case
