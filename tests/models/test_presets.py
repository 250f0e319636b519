"""Every preset has the published parameter count, on the meta device."""

from __future__ import annotations

import subprocess
import sys

import pytest

import moezoo
from moezoo.presets import preset

EXACT = {
    "switch-base-64": 3_790_748_928,
    "switch-base-256": 14_664_154_368,
    "switch-large-128": 26_309_291_008,
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "t5-v1.1-small": 76_961_152,
    "t5-v1.1-base": 247_577_856,
    "t5-v1.1-large": 783_150_080,
    "t5-v1.1-xl": 2_849_757_184,
    "t5-v1.1-xxl": 11_135_332_352,
    "flan-t5-base": 247_577_856,
    "mt5-small": 300_176_768,
    "mt5-base": 582_401_280,
    "umt5-small": 306_601_984,
    "byt5-small": 299_637_760,
    "byt5-base": 581_653_248,
}
ROUNDED = {  # billions, as published
    "switch-base-8": 0.619,
    "switch-base-16": 1.072,
    "switch-base-32": 1.979,
    "switch-base-128": 7.415,
    "switch-xxl-128": 394.7,
    "switch-c-2048": 1571.3,
    "t5-3b": 2.85,
    "t5-11b": 11.3,
    "mt5-large": 1.23,
    "mt5-xl": 3.74,
    "mt5-xxl": 12.9,
    "byt5-large": 1.23,
    "byt5-xl": 3.74,
    "byt5-xxl": 12.9,
}


def count(name: str) -> int:
    return sum(p.numel() for p in moezoo.build(name, device="meta").parameters())


@pytest.mark.parametrize("name", EXACT)
def test_parameter_count_is_the_published_one(name: str) -> None:
    assert count(name) == EXACT[name]


@pytest.mark.parametrize("name", ROUNDED)
def test_parameter_count_rounds_to_the_published_one(name: str) -> None:
    digits = len(str(ROUNDED[name]).partition(".")[2])
    assert round(count(name) / 1e9, digits) == ROUNDED[name]


def test_every_preset_builds_on_meta() -> None:
    for name in moezoo.list_models():
        model = moezoo.build(name, device="meta")
        assert all(p.is_meta for p in model.parameters()), name


def test_list_models_filters_by_pattern() -> None:
    names = moezoo.list_models("switch-base-*")
    assert names == [f"switch-base-{e}" for e in (8, 16, 32, 64, 128, 256)]
    assert moezoo.list_models("nothing*") == []


def test_half_of_the_base_layers_are_sparse_and_all_of_c() -> None:
    assert preset("switch-base-8").encoder_sparse == (1, 3, 5, 7, 9, 11)
    assert preset("switch-c-2048").decoder_sparse == tuple(range(15))


def test_an_unknown_model_names_the_nearest() -> None:
    with pytest.raises(moezoo.MoezooError, match="switch-base-8"):
        moezoo.build("swich-base-8")
    with pytest.raises(LookupError):
        moezoo.build("../etc/passwd")


def test_the_hubs_spelling_of_v1_1_is_understood() -> None:
    assert preset("t5-v1_1-base") == preset("t5-v1.1-base")
    assert moezoo.list_models("t5-v1_1-*") == moezoo.list_models("t5-v1.1-*") != []


def test_presets_import_no_torch() -> None:
    code = "import sys, moezoo; moezoo.list_models(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_building_on_meta_does_not_import_the_compiler() -> None:
    code = (
        "import sys, moezoo; moezoo.build('switch-base-8', device='meta'); "
        "moezoo.build('t5-v1.1-small', device='meta'); print('torch._dynamo' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
