"""The streamed conversion: exact, deterministic, loadable by transformers, reversible."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

import moezoo
from moezoo.adapters.upcycle.convert import convert
from moezoo.adapters.upcycle.recipe import Recipe
from moezoo.errors import ConfigError, NonFiniteWeights, SaveError, TargetExists
from tests.conversion.dense import FAMILIES, dense_t5, encoder_only, ids, relative


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense_t5(tmp_path_factory.mktemp("dense") / "t5")


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(ids(), decoder_input_ids=ids(seed=1)).logits


def test_the_result_loads_in_transformers_without_a_stray_key_and_computes_the_same(
    t5: Path, tmp_path: Path
) -> None:
    moezoo.upcycle(t5, tmp_path / "out", num_experts=4)
    model, found = transformers.SwitchTransformersForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not found["missing_keys"] and not found["unexpected_keys"]
    theirs = logits(model.eval())
    ours = logits(moezoo.load(tmp_path / "out", capacity="dropless"))
    dense = transformers.T5ForConditionalGeneration.from_pretrained(t5).eval()
    assert torch.allclose(theirs, ours, atol=1e-5)
    assert relative(theirs, logits(dense)) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_experts", [2, 3])
def test_every_family_keeps_its_function(family: str, num_experts: int, tmp_path: Path) -> None:
    source = dense_t5(tmp_path / "dense", family)
    moezoo.upcycle(source, tmp_path / "out", num_experts=num_experts, layers="all")
    found = logits(moezoo.load(tmp_path / "out", capacity="dropless"))
    assert relative(found, logits(moezoo.load(source))) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_going_back_gives_the_same_bytes(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = dense_t5(tmp_path / "dense", family, dtype=dtype)
    moezoo.upcycle(source, tmp_path / "out", num_experts=8)
    moezoo.downcycle(tmp_path / "out", tmp_path / "back")
    before = load_file(source / "model.safetensors")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name


def test_an_encoder_alone_is_upcycled_too(tmp_path: Path) -> None:
    source = encoder_only(tmp_path / "dense")
    moezoo.upcycle(source, tmp_path / "out", num_experts=4)
    with torch.no_grad():
        dense = moezoo.load(source)(ids()).last_hidden_state
        sparse = moezoo.load(tmp_path / "out", capacity="dropless")(ids()).last_hidden_state
    assert relative(sparse, dense) <= 1e-5


def test_a_prefixed_single_file_is_upcycled_too(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = dense_t5(tmp_path / "dense")
    tensors = load_file(source / "model.safetensors")
    prefixed = {f"text_encoders.t5xxl.transformer.{name}": t for name, t in tensors.items()}
    prefixed["other.weight"] = torch.zeros(2)
    save_file(prefixed, tmp_path / "bundle.safetensors")
    moezoo.upcycle(tmp_path / "bundle.safetensors", tmp_path / "out", num_experts=2)
    found = logits(moezoo.load(tmp_path / "out", capacity="dropless"))
    assert relative(found, logits(moezoo.load(source))) <= 1e-5


def test_a_recipe_under_2_kb_rebuilds_the_same_bytes(t5: Path, tmp_path: Path) -> None:
    for init in ("copy", "noise:0.1", "drop:0.5"):
        first, second = tmp_path / f"{init}-1", tmp_path / f"{init}-2"
        convert(t5, first, Recipe(4, init=init, seed=7))
        recipe = first / "recipe.json"
        assert recipe.stat().st_size < 2048
        convert(t5, second, Recipe.read(recipe))
        for file in first.iterdir():
            assert file.read_bytes() == (second / file.name).read_bytes(), file.name


def test_shards_and_threads_change_no_tensor(t5: Path, tmp_path: Path) -> None:
    convert(t5, tmp_path / "one", Recipe(4, init="noise:0.1"))
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    try:
        convert(t5, tmp_path / "many", Recipe(4, init="noise:0.1", max_shard_size="9KB"))
    finally:
        torch.set_num_threads(threads)
    whole = load_file(tmp_path / "one" / "model.safetensors")
    parts = {}
    for file in (tmp_path / "many").glob("model-*.safetensors"):
        parts.update(load_file(file))
    assert set(whole) == set(parts) and len(list((tmp_path / "many").glob("model-*"))) > 3
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    model = transformers.SwitchTransformersForConditionalGeneration.from_pretrained(
        tmp_path / "many"
    )
    assert model.config.num_experts == 4


def test_the_tokenizer_is_carried_byte_for_byte(t5: Path, tmp_path: Path) -> None:
    moezoo.upcycle(t5, tmp_path / "out", num_experts=2)
    assert (tmp_path / "out/spiece.model").read_bytes() == (t5 / "spiece.model").read_bytes()


def test_provenance_names_source_hash_recipe_and_version(t5: Path, tmp_path: Path) -> None:
    import hashlib

    moezoo.upcycle(t5, tmp_path / "out", num_experts=2, seed=5)
    made = json.loads((tmp_path / "out/config.json").read_text())["moezoo_provenance"]
    digest = hashlib.sha256((t5 / "model.safetensors").read_bytes()).hexdigest()
    assert made["source_sha256"] == {"model.safetensors": digest}
    router = {"router": "switch", "router_init": "normal"}  # what the recipe left open
    assert made["recipe"] == {"num_experts": 2, "seed": 5, **router} and made["wo_scale"] == 2.0
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["moezoo"])["source_sha256"] == made["source_sha256"]
    assert digest in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("init", ["copy", "split", "virtual_group:2"])
def test_streaming_imports_no_torch_and_stays_under_64_mb(
    init: str, t5: Path, tmp_path: Path
) -> None:
    program = (
        "import re, sys\n"
        "from moezoo.cli import main\n"
        f"words = ['upcycle', {str(t5)!r}, {str(tmp_path / 'out')!r}, '--init', {init!r}]\n"
        "assert main([*words, '--experts', '8']) == 0\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        # ru_maxrss would count the parent at the moment of the fork.
        "status = open('/proc/self/status').read()\n"
        "assert int(re.search(r'VmHWM:\\s+(\\d+) kB', status)[1]) < 64 * 1024\n"
    )
    root = Path(moezoo.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, cwd=root)


def test_another_dtype_is_torchs_conversion(t5: Path, tmp_path: Path) -> None:
    convert(t5, tmp_path / "out", Recipe(2, dtype="bfloat16", preserve="none"))
    before, after = (
        load_file(t5 / "model.safetensors"),
        load_file(tmp_path / "out/model.safetensors"),
    )
    name = "encoder.block.1.layer.1.{}.wo.weight"
    expert = after[name.format("mlp.experts.expert_1")]
    assert torch.equal(expert, before[name.format("DenseReluDense")].bfloat16())
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def test_a_nan_is_refused_by_name_unless_allowed(t5: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = load_file(t5 / "model.safetensors")
    tensors["encoder.block.1.layer.1.DenseReluDense.wi.weight"][3, 2] = float("nan")
    broken = tmp_path / "broken"
    broken.mkdir()
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    (broken / "config.json").write_bytes((t5 / "config.json").read_bytes())
    with pytest.raises(NonFiniteWeights, match=r"encoder.block.1.layer.1.DenseReluDense.wi"):
        convert(broken, tmp_path / "out", Recipe(2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken"]
    convert(broken, tmp_path / "out", Recipe(2), allow_nonfinite=True)


def test_a_scale_that_leaves_the_range_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = dense_t5(tmp_path / "dense", dtype=torch.float16)
    tensors = load_file(source / "model.safetensors")
    tensors["encoder.block.1.layer.1.DenseReluDense.wo.weight"][0, 0] = 60000.0
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(NonFiniteWeights, match="leaves the range of F16.*bfloat16"):
        convert(source, tmp_path / "out", Recipe(8, router="switch"))


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"num_experts": 0}, "num_experts"),
        ({"num_experts": 10**9}, "num_experts"),
        ({"num_experts": True}, "num_experts"),
        ({"num_experts": 4, "layers": "od"}, "layers"),
        ({"num_experts": 4, "layers": "last:9"}, "layers"),
        ({"num_experts": 4, "layers": "enc=0"}, None),
        ({"num_experts": 4, "layers": "none"}, "layers"),
        ({"num_experts": 4, "layers": "enc=1,9"}, "encoder layers"),
        ({"num_experts": 4, "init": "copi"}, None),
        ({"num_experts": 4, "init": "drop:2"}, "rate"),
        ({"num_experts": 5, "init": "split"}, "num_experts"),
        ({"num_experts": 4, "router": "sinkhorn"}, "preserve"),
        ({"num_experts": 4, "preserve": "maybe"}, "preserve"),
        ({"num_experts": 4, "dtype": "float8"}, "dtype"),
        ({"num_experts": 4, "max_shard_size": "many"}, "max_shard_size"),
        ({"num_experts": 4, "router_init": "centroids"}, "calibration"),
    ],
)
def test_bad_recipes_are_refused_by_field_and_leave_nothing(
    options: dict[str, object], field: str | None, t5: Path, tmp_path: Path
) -> None:
    if options.get("layers") == "enc=0":
        convert(t5, tmp_path / "out", Recipe(**options))  # type: ignore[arg-type]
        assert (tmp_path / "out/config.json").exists()
        return
    with pytest.raises(moezoo.MoezooError) as caught:
        convert(t5, tmp_path / "out", Recipe(**options))  # type: ignore[arg-type]
    assert field is None or caught.value.field == field
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stacks", ["all", "enc=all"])
@pytest.mark.parametrize("router", moezoo.routers.names())
def test_what_is_written_with_any_router_loads_and_the_rest_is_refused(
    router: str, stacks: str, t5: Path, tmp_path: Path
) -> None:
    recipe = Recipe(4, layers=stacks, router=router, preserve="none", capacity=None)
    try:
        convert(t5, tmp_path / "out", recipe)
    except ConfigError as error:
        assert "does not tell its weights" in str(error) or "not causal" in str(error)
        assert router not in ("switch", "top_k", "gshard") and not (tmp_path / "out").exists()
        return
    assert logits(moezoo.load(tmp_path / "out")).isfinite().all()


@pytest.mark.parametrize("policy", moezoo.capacity.names())
def test_what_is_written_with_any_policy_loads_and_the_rest_is_refused(
    policy: str, t5: Path, tmp_path: Path
) -> None:
    try:
        convert(t5, tmp_path / "out", Recipe(4, capacity=policy))
    except ConfigError as error:
        assert "not causal" in str(error)
        assert policy in ("batch_priority", "random_order", "reroute")
        return
    assert logits(moezoo.load(tmp_path / "out")).isfinite().all()


@pytest.mark.parametrize("preserve", ["exact", "none"])
@pytest.mark.parametrize(
    ("component", "message"),
    [
        *(
            ({"router": {"name": "top_k", "k": k}}, "k is out of range")
            for k in (0, -1, 5, 1.5, True, None, "two", [2])
        ),
        ({"router": {"name": "top_k", "kk": 2}}, "no option 'kk'"),
        ({"router": {"name": "top_k", "softmax": "x"}}, "option 'softmax'"),
        ({"router": {"name": "top_k", "softmax": "after", "k": 1}}, "constant"),
        ({"router": {"name": "switch", "k": 2}}, "no option 'k'"),
        ({"router": {"name": "switch", "weight": "x"}}, "option 'weight'"),
        ({"router": {"name": "switch", "jitter": -1.0}}, "jitter"),
        ({"capacity": {"name": "switch", "factor": -1.0}}, "factor must be"),
        ({"capacity": {"name": "dropless", "factor": 2.0}}, "no option 'factor'"),
        ({"capacity": {"name": "transformers", "capacity": 3}}, "no option 'capacity'"),
    ],
    ids=str,
)
def test_options_that_no_model_can_have_are_refused_and_nothing_is_written(
    component: dict[str, Any], message: str, preserve: str, t5: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        convert(t5, tmp_path / "out", Recipe(4, preserve=preserve, **component))
    assert not list(tmp_path.glob("out*"))


def test_targets_that_would_lose_something_are_refused(t5: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "precious").write_text("data")
    (tmp_path / "link").symlink_to(t5)
    with pytest.raises(TargetExists, match="exists already"):
        convert(t5, taken, Recipe(2))
    for target in (t5, tmp_path / "link", t5 / "inside", t5.parent):
        with pytest.raises(SaveError, match="the target"):
            convert(t5, target, Recipe(2), overwrite=True)
    convert(t5, taken, Recipe(2), overwrite=True)
    assert not (taken / "precious").exists() and (taken / "model.safetensors").exists()


def test_a_sparse_source_is_refused(t5: Path, tmp_path: Path) -> None:
    convert(t5, tmp_path / "out", Recipe(2))
    with pytest.raises(ConfigError, match="already.*grow"):
        convert(tmp_path / "out", tmp_path / "again", Recipe(2))


def test_permissions_follow_the_umask(t5: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        convert(t5, tmp_path / "out", Recipe(2))
    finally:
        os.umask(before)
    modes = {p.stat().st_mode & 0o777 for p in (tmp_path / "out").iterdir()}
    assert modes == {0o640} and (tmp_path / "out").stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("name", ["with space", "ünïcode", "new\nline", "n" * 255, "-dash"])
def test_odd_target_names_work(name: str, t5: Path, tmp_path: Path) -> None:
    convert(t5, tmp_path / name, Recipe(2))
    assert (tmp_path / name / "model.safetensors").exists()
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_source_that_changes_meanwhile_is_refused(t5: Path, tmp_path: Path) -> None:
    source = dense_t5(tmp_path / "dense")
    touched = []

    def touch(_: int) -> None:
        if not touched:
            touched.append(os.utime(source / "model.safetensors", ns=(1, 1)))

    with pytest.raises(moezoo.MoezooError, match="changed while it was read"):
        convert(source, tmp_path / "out", Recipe(2), progress=touch)
    assert not (tmp_path / "out").exists()
