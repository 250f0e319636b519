"""A model card says how to load the model, where it comes from and under which licence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import moezoo
from moezoo.adapters.upcycle.merge import merge
from moezoo.adapters.upcycle.recipe import Recipe
from moezoo.cli import main

SIZES = {"vocab_size": 384, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_heads": 2, "num_layers": 2}
LICENSED = "---\nlanguage: en\nlicense: apache-2.0\n---\n\n# T5\n"


def dense(folder: Path, *, card: str | None = None, seed: int = 0) -> Path:
    model = moezoo.build(moezoo.SwitchConfig(**SIZES), seed=seed)
    moezoo.save(model, folder, tokenizer=moezoo.ByteTokenizer())
    if card is not None:
        (folder / "README.md").write_text(card)
    return folder


def front(folder: Path) -> dict[str, object]:
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def usage(folder: Path) -> str:
    """The Python of a card, for the directory that it lies in."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", (folder / "README.md").read_text(), re.M | re.S)
    return code.replace('"DIR"', repr(str(folder)))


@pytest.mark.parametrize("layout", ["huggingface", "moezoo"])
def test_the_usage_of_a_card_runs_in_moezoo_and_transformers(layout: str, tmp_path: Path) -> None:
    source = dense(tmp_path / "t5", card=LICENSED)
    moezoo.upcycle(source, tmp_path / "switch", num_experts=2, layout=layout)
    code = usage(tmp_path / "switch")
    assert ("register()" in code) == (layout == "moezoo")
    names: dict[str, object] = {}
    exec(code, names)
    assert type(names["model"]).__name__.endswith("ForConditionalGeneration")


def test_base_model_and_licence_are_those_of_the_source(tmp_path: Path) -> None:
    source = dense(tmp_path / "models--google-t5--t5-base" / "snapshots" / "1a2b", card=LICENSED)
    moezoo.upcycle(source, tmp_path / "switch", num_experts=2)
    found = front(tmp_path / "switch")
    assert found["base_model"] == ["google-t5/t5-base"] and found["license"] == "apache-2.0"
    moezoo.downcycle(tmp_path / "switch", tmp_path / "again")
    assert front(tmp_path / "again")["base_model"] == ["switch"]
    assert front(tmp_path / "again")["license"] == "apache-2.0"


@pytest.mark.parametrize(
    "other", [None, "# no front matter", LICENSED.replace("apache-2.0", "mit")]
)
def test_a_licence_that_is_not_known_is_not_invented(other: str | None, tmp_path: Path) -> None:
    paths = [dense(tmp_path / "a", card=LICENSED), dense(tmp_path / "b", card=other, seed=1)]
    merge(paths, tmp_path / "out", Recipe(2, init="branches"))
    found = front(tmp_path / "out")
    assert "license" not in found and found["base_model"] == ["a", "b"]
    assert found["base_model_relation"] == "merge"
    assert "whose files do not say which" in (tmp_path / "out" / "README.md").read_text()


def test_a_fine_tuned_model_has_a_card(tmp_path: Path) -> None:
    source = dense(tmp_path / "t5", card=LICENSED)
    (tmp_path / "pairs.tsv").write_text("".join(f"in {i}\tout {i}\n" for i in range(20)))
    words = ["--pairs", tmp_path / "pairs.tsv", "--no-header", "--steps", 2, "--batch-size", 4]
    words += ["--prefix", "say: ", "--examples", 1, "--recipe", "small"]
    assert main(list(map(str, ["finetune", source, tmp_path / "tuned", *words]))) == 0
    model = tmp_path / "tuned" / "model"
    found, text = front(model), (model / "README.md").read_text()
    assert found["base_model"] == ["t5"] and found["base_model_relation"] == "finetune"
    assert found["license"] == "apache-2.0"
    assert (
        "| trained | 2 steps of 4 examples |" in text
        and "| put before every source | `say: ` |" in text
    )
    assert "held-out nats per token, step 2" in text and '"optimizer": "adamw"' in text
    exec(usage(model), {})
    moezoo.upcycle(model, tmp_path / "switch", num_experts=2)  # and is a source like any other
    assert front(tmp_path / "switch")["license"] == "apache-2.0"


def test_a_tokenizer_is_saved_beside_a_live_model(tmp_path: Path) -> None:
    folder = dense(tmp_path / "t5")
    assert main(["generate", str(folder), "a text", "--max-new-tokens", "2"]) == 0
