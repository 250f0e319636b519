"""The common tests of transformers, from the source distribution of the installed version.

They are no part of its wheel. `fetch` puts them below `.cache/`; nothing of them is committed. The
tests of generation and of PEFT are not in the distribution: TRANSFORMERS_TESTS names the folder
`tests` of a checkout of transformers that has all of them.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
import types
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import transformers
import transformers.utils

CACHE = Path(__file__).parents[3] / ".cache" / "transformers-tests"
_PACKAGE = "transformers_common_tests"
_FILES = ("test_modeling_common.py", "test_configuration_common.py")
GENERATION = "generation.test_utils"
PEFT = "peft_integration.test_peft_integration"
# What the mixins import from files that the distribution does not hold, or that need more.
_ABSENT = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    GENERATION: {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {
        "config_common_kwargs": {
            "return_dict": False,
            "output_hidden_states": True,
            "tie_word_embeddings": False,
            "is_encoder_decoder": True,
            "finetuning_task": "translation",
            "id2label": {0: "label"},
            "label2id": {"label": "0"},
            "task_specific_params": {"first": "second"},
            "problem_type": "regression",
            "pad_token_id": 7,
            "eos_token_id": 8,
            "decoder_start_token_id": 10,
            "dtype": "float16",
            "chunk_size_feed_forward": 5,
            "architectures": ["Other"],
        }
    },
}


def folder() -> Path:
    """A checkout's tests, or where those of the installed version are, once fetched."""
    named = os.environ.get("TRANSFORMERS_TESTS")
    return Path(named) if named else CACHE / transformers.__version__


def has(name: str) -> bool:
    """Whether a module of the tests is there: GENERATION, PEFT."""
    return (folder() / name.replace(".", "/")).with_suffix(".py").is_file()


def fetch() -> Path:
    """Download the source distribution of the installed version, and keep its test mixins.

    Raises CalledProcessError where pip cannot have it, FileNotFoundError for a named folder that
    lacks them.
    """
    target = folder()
    missing = [name for name in _FILES if not (target / name).is_file()]
    if not missing:
        return target
    if target.parent != CACHE:  # a checkout, which is nothing to download into
        raise FileNotFoundError(f"TRANSFORMERS_TESTS={target} has no {missing[0]}")
    with tempfile.TemporaryDirectory() as place:
        wanted = f"transformers=={transformers.__version__}"
        command = [sys.executable, "-m", "pip", "download", wanted, "--no-deps", "--quiet"]
        options = ["--no-binary", "transformers", "--dest", place, "--retries", "1"]
        subprocess.run([*command, *options], check=True, timeout=240)
        (archive,) = Path(place).glob("transformers-*.tar.gz")
        target.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as files:
            for name in _FILES:
                member = files.extractfile(f"transformers-{transformers.__version__}/tests/{name}")
                assert member is not None
                (target / name).write_bytes(member.read())
    return target


def load(name: str) -> Any:
    """A module of the tests. Raises FileNotFoundError before `fetch`."""
    place = folder()
    if not place.is_dir():
        raise FileNotFoundError(place)
    if _PACKAGE not in sys.modules:
        package = types.ModuleType(_PACKAGE)
        package.__path__ = [str(place)]
        sys.modules[_PACKAGE] = package
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pytest marks of their own
        return importlib.import_module(f"{_PACKAGE}.{name}")


def mixins() -> tuple[Any, Any]:
    """The modules of the model tests and of the config tests. Raises FileNotFoundError before
    `fetch`.
    """
    for name, values in _ABSENT.items():
        if name == GENERATION and has(name):
            continue
        parent, _, leaf = name.partition(".")
        holder = types.ModuleType(f"{_PACKAGE}.{parent}")
        holder.__path__ = []
        module = types.ModuleType(f"{_PACKAGE}.{name}")
        vars(module).update(values)
        sys.modules[holder.__name__], sys.modules[module.__name__] = holder, module
        setattr(holder, leaf, module)
    with mock.patch.object(transformers.utils, "direct_transformers_import", lambda path: None):
        config = load("test_configuration_common")
    return load("test_modeling_common"), config


if __name__ == "__main__":
    print(fetch())
