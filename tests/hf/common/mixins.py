"""The common tests of the installed transformers, from its source distribution.

They are no part of its wheel. `fetch` puts them below `.cache/`; nothing of them is committed.
"""

from __future__ import annotations

import importlib
import importlib.util
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
# What the mixins import from files that the distribution does not hold.
_ABSENT = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
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
    """Where the tests of the installed version are, once fetched."""
    return CACHE / transformers.__version__


def fetch() -> Path:
    """Download the source distribution of the installed version, and keep its test mixins.

    Raises CalledProcessError where pip cannot have it.
    """
    target = folder()
    if all((target / name).is_file() for name in _FILES):
        return target
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


def mixins() -> tuple[Any, Any]:
    """The modules of the model tests and of the config tests. Raises FileNotFoundError before
    `fetch`.
    """
    place = folder()
    if not place.is_dir():
        raise FileNotFoundError(place)
    package = types.ModuleType(_PACKAGE)
    package.__path__ = [str(place)]
    sys.modules[_PACKAGE] = package
    for name, values in _ABSENT.items():
        parent, _, leaf = name.partition(".")
        holder = types.ModuleType(f"{_PACKAGE}.{parent}")
        holder.__path__ = []
        module = types.ModuleType(f"{_PACKAGE}.{name}")
        vars(module).update(values)
        sys.modules[holder.__name__], sys.modules[module.__name__] = holder, module
        setattr(holder, leaf, module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pytest marks of their own
        with mock.patch.object(transformers.utils, "direct_transformers_import", lambda path: None):
            config = importlib.import_module(f"{_PACKAGE}.test_configuration_common")
        return importlib.import_module(f"{_PACKAGE}.test_modeling_common"), config


if __name__ == "__main__":
    print(fetch())
