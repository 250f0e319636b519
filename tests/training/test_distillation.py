"""Distillation: the paper's loss, a student that starts from its teacher, a teacher at rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import moezoo
from moezoo.cli import main
from moezoo.training.checkpoints import checkpoints
from moezoo.training.distillation import Distillation, soft_cross_entropy, student_of
from moezoo.training.loop import fit, start
from moezoo.training.recipes import TrainingRecipe
from tests.training.runs import differences
from tests.training.test_loop import batches
from tests.training.text import small_model, tokenizer


def test_the_loss_is_a_quarter_teacher_and_three_quarters_labels() -> None:
    teacher, batch = small_model(), batches(4)(0)
    batch["labels"][1, 3:] = -100
    student = student_of(teacher, seed=1).eval()
    output = Distillation(teacher)(student, batch)
    with torch.no_grad():
        mine, theirs = student(**batch).logits, teacher(**batch).logits
    total, count = 0.0, 0
    for row, column in (batch["labels"] != -100).nonzero().tolist():
        log_probs = mine[row, column].log_softmax(0)
        wanted = int(batch["labels"][row, column])
        total -= 0.75 * float(log_probs[wanted])
        total -= 0.25 * float((theirs[row, column].softmax(0) * log_probs).sum())
        count += 1
    assert output.loss.item() == pytest.approx(total / count, rel=1e-5)
    assert set(output.losses) == {"cross_entropy", "teacher"}
    assert Distillation(teacher, 0.0)(student, batch).loss.item() == pytest.approx(
        student(**batch).loss.item()
    )


def test_nothing_to_predict_is_a_loss_of_zero() -> None:
    labels = torch.full((2, 3), -100)
    logits = torch.randn(2, 3, 5, requires_grad=True)
    loss = soft_cross_entropy(logits, torch.randn(2, 3, 5), labels)
    loss.backward()
    assert loss.item() == 0.0
    assert not logits.grad.any()


@pytest.mark.parametrize("shared", [None, {}])
def test_a_student_starts_from_all_weights_but_routers_and_experts(shared: object) -> None:
    teacher = small_model(shared_expert=shared)
    student = student_of(teacher, seed=0)
    assert student.config.num_experts == 0
    theirs = teacher.state_dict()
    fresh = {name for name in student.state_dict() if name not in theirs}
    assert {name.partition(".mlp.")[0] for name in fresh} == {
        "encoder.blocks.1",
        "decoder.blocks.1",
    }
    assert all(name.endswith((".mlp.wi.weight", ".mlp.wo.weight")) for name in fresh)
    for name, tensor in student.state_dict().items():
        assert name in fresh or torch.equal(tensor, theirs[name]), name


def test_the_teacher_gets_no_gradient_and_the_student_comes_nearer_to_it() -> None:
    teacher, data = small_model(), batches(8)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student, objective = student_of(teacher, seed=0), Distillation(teacher, 1.0)
    settings = TrainingRecipe(learning_rate=3e-3)
    records = fit(start(student, settings, steps=15), data, settings, steps=15, objective=objective)
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert not teacher.training
    assert records[-1].losses["teacher"] < records[0].losses["teacher"] - 0.1


def test_what_cannot_teach_is_named() -> None:
    with pytest.raises(moezoo.MoezooError, match="no experts"):
        student_of(small_model(num_experts=0))
    with pytest.raises(moezoo.MoezooError, match="teacher_weight|weight lies"):
        Distillation(small_model(), 1.5)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Switch checkpoint with its tokenizer, and a text beside it."""
    from moezoo.training.session import save_with_tokenizer

    folder = tmp_path_factory.mktemp("teacher")
    save_with_tokenizer(small_model(), tokenizer(), folder / "switch")
    (folder / "text.txt").write_text("\n\n".join(f"a line about item {i}" * 9 for i in range(40)))
    return folder


def distil(teacher: Path, out: Path, *more: object) -> int:
    words = ["train", out, "--teacher", teacher / "switch", "--text", teacher / "text.txt"]
    words += ["--steps", 6, "--batch-size", 4, "--input-length", 32, "--recipe", "distill"]
    words += ["--save-every", 2, "--evaluate-every", 3, *more]
    return main([str(word) for word in words])


def test_a_distillation_is_a_recipe_of_train_and_goes_on_bit_for_bit(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distil(teacher, tmp_path / "whole", "--optimizer", "adamw") == 0
    student = moezoo.load(tmp_path / "whole" / "model")
    assert student.config.num_experts == 0
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert rows[0]["losses"].keys() == {"cross_entropy", "teacher"}

    assert distil(teacher, tmp_path / "parts", "--optimizer", "adamw") == 0
    found = checkpoints(tmp_path / "parts" / "checkpoints")
    assert [path.name for path in found] == ["step-00000004", "step-00000006"]
    again = ["--optimizer", "adamw", "--resume-from", 4]
    assert distil(teacher, tmp_path / "parts", *again) == 0
    assert not differences(tmp_path / "parts", tmp_path / "whole")

    other = moezoo.build(small_model().config, seed=5)
    moezoo.save(other, teacher / "other")
    (teacher / "other" / "spiece.model").write_bytes(
        (teacher / "switch" / "spiece.model").read_bytes()
    )
    (teacher / "switch").rename(teacher / "kept")
    (teacher / "other").rename(teacher / "switch")
    assert distil(teacher, tmp_path / "parts", *again) == 3
    assert "teacher" in capsys.readouterr().err
