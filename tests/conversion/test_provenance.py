"""What a converted checkpoint tells of itself, and what other conversions make of it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import moezoo
from moezoo.adapters.upcycle.convert import convert
from moezoo.adapters.upcycle.export import export
from moezoo.adapters.upcycle.grow import grow
from moezoo.adapters.upcycle.merge import merge
from moezoo.adapters.upcycle.recipe import Recipe
from moezoo.adapters.upcycle.shrink import shrink
from moezoo.adapters.verify import verify
from moezoo.errors import ConfigError, MoezooError
from tests.conversion.dense import dense_t5
from tests.conversion.test_containers import write_t5x


@pytest.fixture
def t5(tmp_path: Path) -> Path:
    return dense_t5(tmp_path / "t5")


def provenance(path: Path) -> dict[str, Any]:
    made: dict[str, Any] = json.loads((path / "config.json").read_text())["moezoo_provenance"]
    return made


def same_tensors(one: Path, other: Path) -> bool:
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return set(first) == set(second) and all(torch.equal(first[n], second[n]) for n in first)


CHAINS: dict[str, Callable[[Path, Path], object]] = {
    "grow": lambda source, out: grow(source, out, factor=2),
    "export": lambda source, out: export(source, out, layout="moezoo"),
    "shrink": lambda source, out: shrink(source, out, num_experts=2),
}


@pytest.mark.parametrize("preserve", ["exact", "none"])
@pytest.mark.parametrize("step", CHAINS)
def test_the_dense_model_comes_back_through_other_conversions(
    step: str, preserve: str, t5: Path, tmp_path: Path
) -> None:
    convert(t5, tmp_path / "up", Recipe(4, preserve=preserve))
    CHAINS[step](tmp_path / "up", tmp_path / "on")
    moezoo.downcycle(tmp_path / "on", tmp_path / "back")
    assert same_tensors(tmp_path / "back", t5)


def test_an_exported_model_is_verified_by_the_recipe_of_its_upcycling(
    t5: Path, tmp_path: Path
) -> None:
    convert(t5, tmp_path / "up", Recipe(4))
    export(tmp_path / "up", tmp_path / "ours", layout="moezoo")
    export(tmp_path / "ours", tmp_path / "half", dtype="bfloat16")
    for name in ("ours", "half"):
        found = verify(tmp_path / name, t5)
        assert found.passed and len(found.results) == 5, found.line
    grow(tmp_path / "up", tmp_path / "grown")
    with pytest.raises(ConfigError, match=r"made by 'grow'.*Verify the upcycled model"):
        verify(tmp_path / "grown", t5)


def test_every_conversion_names_its_sources_with_their_hashes(t5: Path, tmp_path: Path) -> None:
    convert(t5, tmp_path / "up", Recipe(4))
    other = dense_t5(tmp_path / "u5")
    merge([t5, other], tmp_path / "merge", Recipe(2, init="branches"))
    for name, step in CHAINS.items():
        step(tmp_path / "up", tmp_path / name)
    moezoo.downcycle(tmp_path / "up", tmp_path / "downcycle")
    for name in ("grow", "export", "shrink", "downcycle", "merge"):
        made = provenance(tmp_path / name)
        sources = [t5, other] if name == "merge" else [tmp_path / "up"]
        assert made["operation"] == name and made["moezoo_version"] == moezoo.__version__
        for entry, source in zip(made["made_from"], sources, strict=True):
            digest = hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()
            assert entry["source"] == source.name
            assert entry["source_sha256"] == {"model.safetensors": digest}
            assert digest in (tmp_path / name / "README.md").read_text()
            assert ("provenance" in entry) == (name != "merge")
        with safe_open(tmp_path / name / "model.safetensors", "pt") as file:
            assert json.loads(file.metadata()["moezoo"]) == made


def test_two_sources_of_one_name_stay_two_lines(t5: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = dense_t5(tmp_path / "other" / "t5", dropout_rate=0.0)
    merge([t5, other], tmp_path / "out", Recipe(2, init="branches"))
    assert (tmp_path / "out/README.md").read_text().count("- `t5/model.safetensors` sha256") == 2


@pytest.mark.parametrize("layout", ["auto", "moezoo"])
def test_the_card_names_the_layout_that_was_written(layout: str, t5: Path, tmp_path: Path) -> None:
    report = convert(t5, tmp_path / "out", Recipe(2, router="switch"), layout=layout)
    words = {"auto": "Hugging Face Switch", "moezoo": "moezoo, as asked for"}[layout]
    assert report.plan.layout == words
    card = (tmp_path / "out/README.md").read_text()
    assert f"| layout | {words} |" in card and "| experts per sparse layer | 2 |" in card
    assert f"| parameters | {report.plan.parameters:,} |" in card


def test_a_rewrite_of_a_source_that_changes_meanwhile_is_refused(
    t5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moezoo.adapters.upcycle import rewrite

    def touch(*arguments: Any) -> None:
        os.utime(t5 / "model.safetensors", ns=(1, 1))
        write(*arguments)

    write = rewrite._write
    monkeypatch.setattr(rewrite, "_write", touch)
    with pytest.raises(MoezooError, match="changed while it was read"):
        export(t5, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_arrays_of_t5x_are_hashed_and_watched(t5: Path, tmp_path: Path) -> None:
    source = tmp_path / "t5x"
    source.mkdir()
    write_t5x(load_file(t5 / "model.safetensors"), source)
    (source / "config.json").write_bytes((t5 / "config.json").read_bytes())
    chunk = source / "target.encoder.layers_0.attention.query.kernel" / "0.0"

    def touch(_: int) -> None:
        os.utime(chunk, ns=(1, 1))

    with pytest.raises(MoezooError, match="changed while it was read"):
        convert(source, tmp_path / "out", Recipe(2), progress=touch)
    convert(source, tmp_path / "out", Recipe(2))
    assert set(provenance(tmp_path / "out")["source_sha256"]) == {"checkpoint", "arrays"}
    (source / "target.encoder.layers_0.mlp.wi.kernel" / "note").write_text("new")
    found = verify(tmp_path / "out", source, levels=[2])
    assert not found.passed and "arrays is not the one" in found.line


@pytest.mark.parametrize("field", ["num_decoder_layers", "feed_forward_proj", "is_gated_act"])
def test_configs_of_old_that_leave_a_field_out_verify(field: str, t5: Path, tmp_path: Path) -> None:
    values = json.loads((t5 / "config.json").read_text())
    values.pop(field)
    (t5 / "config.json").write_text(json.dumps(values))
    convert(t5, tmp_path / "out", Recipe(4))
    assert verify(tmp_path / "out", t5).passed
