"""Training on a GPU by the command: it learns in mixed precision, and goes on after a stop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import moezoo
from moezoo.cli import main
from moezoo.training.loop import fit, start
from moezoo.training.recipes import TrainingRecipe
from moezoo.training.session import save_with_tokenizer
from tests.training.test_loop import batches
from tests.training.text import small_model, tokenizer


def test_a_few_steps_lower_the_loss_in_mixed_precision_with_dropout_and_checkpointing() -> None:
    model = small_model(dropout_rate=0.1).cuda()
    model.gradient_checkpointing()
    settings = TrainingRecipe(learning_rate=5e-3, autocast="bfloat16")
    records = fit(start(model, settings, steps=40), batches(16), settings, steps=40)
    assert sum(r.loss for r in records[-5:]) / 5 < records[0].loss - 0.3
    assert all(r.gradient_norm > 0 and 0 <= r.dropped < 1 for r in records)


def test_the_command_trains_and_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    source, text, run = tmp_path / "source", tmp_path / "text.txt", tmp_path / "run"
    save_with_tokenizer(small_model(dropout_rate=0.1), tokenizer(), source)
    text.write_text("\n\n".join(f"a line about item {i}. " * 9 for i in range(40)))
    words = ["train", run, "--from", source, "--text", text, "--device", "cuda", "--steps", 8]
    words += ["--batch-size", 4, "--input-length", 32, "--save-every", 4, "--autocast", "bfloat16"]
    assert main([str(word) for word in words]) == 0
    first = moezoo.load(run / "model").state_dict()
    assert main([str(word) for word in (*words, "--resume-from", 4)]) == 0
    for name, tensor in moezoo.load(run / "model").state_dict().items():
        # Sums by atomic additions have no fixed order: near, and not equal to the bit.
        torch.testing.assert_close(tensor, first[name], atol=5e-3, rtol=1e-2, msg=name)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:TensorFloat32:UserWarning")
def test_a_compiled_model_computes_what_eager_code_does() -> None:
    torch._dynamo.reset()
    model = small_model(dropout_rate=0.0).cuda()
    batch = {name: tensor.cuda() for name, tensor in batches(4)(0).items()}
    with torch.no_grad():
        expected = model(**batch).loss
        found = torch.compile(model)(**batch).loss
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
