"""Trainer, Accelerate and PEFT train a wrapped model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moezoo.adapters.hf import AdaptRouters, MoezooForConditionalGeneration

from .tiny import batch, wrapped

pytest.importorskip("accelerate")

from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments  # noqa: E402


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The rows of one batch, again and again."""

    def __init__(self) -> None:
        self.batch = batch(8)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: tensor[index] for name, tensor in self.batch.items()}


def trainer(model: Any, folder: Path, **options: Any) -> Seq2SeqTrainer:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        "logging_strategy": "no",
        **options,
    }
    arguments = Seq2SeqTrainingArguments(output_dir=str(folder), **settings)
    return Seq2SeqTrainer(
        model=model, args=arguments, train_dataset=Rows(), eval_dataset=Rows(),
        callbacks=[AdaptRouters()],
    )  # fmt: skip


def test_seq2seq_trainer_lowers_the_loss_and_generates(tmp_path: Path) -> None:
    model, inputs = wrapped(), batch(8)
    before = model(**inputs).loss.item()
    run = trainer(
        model, tmp_path, max_steps=12, predict_with_generate=True, generation_max_length=6,
        gradient_checkpointing=True,
    )  # fmt: skip
    run.train()
    assert model.eval()(**inputs).loss.item() < 0.8 * before
    found = run.predict(Rows())
    assert found.predictions.shape[0] == 8
    assert found.metrics["test_loss"] == pytest.approx(model(**inputs).loss.item(), rel=0.2)


def test_a_resumed_trainer_ends_with_the_same_weights(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = wrapped()
    trainer(whole, tmp_path / "run", **saving).train()
    resumed = wrapped()
    with torch.no_grad():
        for parameter in resumed.parameters():
            parameter.zero_()
    run = trainer(resumed, tmp_path / "run", **saving)
    run.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    pairs = zip(whole.parameters(), resumed.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    loaded = MoezooForConditionalGeneration.from_pretrained(tmp_path / "run" / "checkpoint-4")
    assert torch.equal(loaded(**batch()).logits, whole.eval()(**batch()).logits)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_balancing_biases_adapt_once_per_step_under_trainer(
    checkpointing: bool, tmp_path: Path
) -> None:
    model = wrapped(router={"name": "sigmoid_top_k", "k": 1, "bias_rate": 0.5})
    biases = [b for name, b in model.named_buffers() if name.endswith("expert_bias")]
    run = trainer(model, tmp_path, max_steps=1, gradient_checkpointing=checkpointing)
    run.train()
    assert len(biases) == 2
    for bias in biases:
        assert set(bias.abs().tolist()) <= {0.0, 0.5}
        assert bias.any()


def test_lora_trains_attention_and_experts_and_nothing_else(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, inputs = wrapped(), batch()
    expected = model(**inputs).logits
    config = peft.LoraConfig(
        r=2, target_modules=["q", "v"], target_parameters=["experts.wi", "experts.wo"],
        task_type="SEQ_2_SEQ_LM",
    )  # fmt: skip
    adapted = peft.get_peft_model(model, config)
    torch.testing.assert_close(adapted(**inputs).logits, expected)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert all("lora_" in name for name in trained)
    assert any(".experts." in name for name in trained)
    frozen = {n: p.clone() for n, p in adapted.named_parameters() if not p.requires_grad}
    trainer(adapted, tmp_path / "run").train()
    now = dict(adapted.named_parameters())
    assert all(torch.equal(now[name], before) for name, before in frozen.items())
    after = adapted.eval()(**inputs).logits
    assert not torch.allclose(after, expected)
    adapted.save_pretrained(tmp_path / "lora")
    again = peft.PeftModel.from_pretrained(wrapped(), tmp_path / "lora").eval()
    torch.testing.assert_close(again(**inputs).logits, after)


def test_accelerate_prepares_and_unwraps_it() -> None:
    from accelerate import Accelerator

    model = wrapped().train()
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    before = prepared(**batch()).loss
    accelerator.backward(before)
    optimizer.step()
    assert prepared(**batch()).loss < before
    assert accelerator.unwrap_model(prepared) is model
