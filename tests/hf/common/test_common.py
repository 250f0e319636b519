"""The wrapped models pass the common tests of transformers, in the place of its own T5."""

from __future__ import annotations

import unittest
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
from transformers.core_model_loading import WeightConverter

from moezoo.adapters.hf import MoezooConfig

from .families import ENCODER, FAMILIES, SIZES, WHOLE, Inputs
from .mixins import mixins

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs

try:
    modeling, configuration = mixins()
except FileNotFoundError:
    pytest.skip(
        "the common tests of transformers are not there: make common fetches them",
        allow_module_level=True,
    )
except ModuleNotFoundError as error:
    pytest.skip(f"the common tests of transformers need {error.name}", allow_module_level=True)


@pytest.fixture(autouse=True)
def known_by_name() -> Iterator[None]:
    """The tests ask transformers' tables of class names whether a model has labels."""
    heads = modeling.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    bodies = {"moezoo": tuple(kind.__name__ for kind in (WHOLE[0], *ENCODER))}
    with mock.patch.dict(heads, {"moezoo": WHOLE[1].__name__}):
        with mock.patch.dict(modeling.MODEL_MAPPING_NAMES, bodies):
            yield


def _tests(family: str, *, encoder: bool) -> type[Any]:
    generates = () if encoder else (modeling.GenerationTesterMixin,)

    class Tests(modeling.ModelTesterMixin, *generates, unittest.TestCase):  # type: ignore[name-defined,misc]
        all_model_classes = ENCODER if encoder else WHOLE
        is_encoder_decoder = not encoder
        test_resize_embeddings = not encoder
        test_can_init_all_missing_weights_before_2023 = True
        # An expert that no token chose has no gradient.
        test_all_params_have_gradient = family != "switch"

        def setUp(self) -> None:
            self.model_tester = Inputs(family, encoder=encoder)
            self.config_tester = configuration.ConfigTester(
                self, config_class=MoezooConfig, d_model=SIZES["d_model"]
            )

        def test_config(self) -> None:
            self.config_tester.run_common_tests()

        def test_reverse_loading_mapping(self) -> None:
            """Theirs, without what it wants besides: that every converter finds something in every
            model. Ours are for stacks of experts, and most models have some of them or none.
            """
            everything = modeling.get_model_conversion_mapping

            def used(model: Any, **options: Any) -> list[Any]:
                names = model.state_dict()
                return [
                    conversion
                    for conversion in everything(model, **options)
                    if not isinstance(conversion, WeightConverter)
                    or any(name.endswith(conversion.target_patterns[0]) for name in names)
                ]

            with mock.patch.object(modeling, "get_model_conversion_mapping", used):
                super().test_reverse_loading_mapping()

    Tests.__name__ = f"{family.capitalize()}{'Encoder' if encoder else ''}"
    Tests.__qualname__ = Tests.__name__
    return Tests


for _family in FAMILIES:
    for _encoder in (False, True):
        _made = _tests(_family, encoder=_encoder)
        globals()[_made.__name__] = _made
del _made
