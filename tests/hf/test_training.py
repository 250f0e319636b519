"""Trainer, Accelerate and PEFT train a wrapped model."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moezoo
from moezoo.adapters.hf import AdaptRouters, MoezooForConditionalGeneration

from .tiny import batch, wrapped

pytest.importorskip("accelerate")

from transformers import (  # noqa: E402
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)


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


def test_smoothed_labels_keep_router_losses_and_leave_padding_out(tmp_path: Path) -> None:
    model, inputs = wrapped().train(), batch()
    plain = model(**inputs)
    model.config.label_smoothing = 0.2
    smooth = model(**inputs)
    labels = inputs["labels"]
    log_probs = plain.logits.log_softmax(-1)
    real = labels != -100
    nll = -log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0][real].mean()
    spread = -log_probs.mean(-1)[real].mean()
    torch.testing.assert_close(smooth.loss, 0.8 * nll + 0.2 * spread + plain.aux_loss)
    assert torch.equal(model.eval()(**inputs).loss, wrapped()(**inputs).loss)  # in plain nats
    run = trainer(wrapped(), tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(moezoo.MoezooError, match="config.label_smoothing = 0.1"):
        run.train()


def test_a_loss_of_ones_own_has_the_router_losses_at_hand(tmp_path: Path) -> None:
    seen = []

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        seen.append(outputs.aux_loss)
        flat = outputs.logits.flatten(0, 1)
        return torch.nn.functional.cross_entropy(flat, labels.flatten()) + outputs.aux_loss

    model = wrapped()

    def collated(rows: Any) -> dict[str, Tensor]:
        made = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        shifted = model.prepare_decoder_input_ids_from_labels(made["labels"])
        return {**made, "decoder_input_ids": shifted}

    run = trainer(model, tmp_path, max_steps=1, remove_unused_columns=False)
    run.compute_loss_func, run.data_collator = loss, collated
    run.train()
    assert seen and all(float(part.detach()) > 0 for part in seen)
    routers = [p for name, p in model.named_parameters() if "router" in name]
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in routers)


@pytest.mark.parametrize("find_unused", [False, True])
def test_trainer_under_ddp_trains_both_ranks_alike(find_unused: bool, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
               "--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0",
               "-m", "tests.hf.ddp", str(tmp_path), str(int(find_unused))]  # fmt: skip
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr[-2000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    start = dict(wrapped().named_parameters())
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name])
    assert any(not torch.equal(tensor, start[name]) for name, tensor in first.items())


def test_dynamic_quantisation_finds_the_linear_maps() -> None:
    model, inputs = wrapped(), batch()
    before = model(**inputs).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)
    kinds = [type(module).__module__ for module in small.modules()]
    plain = [m for m in model.modules() if type(m) is torch.nn.Linear]
    assert sum("quantized.dynamic" in kind for kind in kinds) == len(plain) > 20
    after = small(**inputs).logits
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, before, atol=0.3, rtol=0.1)


@pytest.mark.parametrize("tied", [False, True])
def test_offloaded_weights_compute_the_same(tied: bool, tmp_path: Path) -> None:
    from accelerate import cpu_offload, disk_offload

    expected = wrapped(tie_word_embeddings=tied)(**batch()).logits
    model = wrapped(tie_word_embeddings=tied)
    cpu_offload(model, torch.device("cpu"))
    torch.testing.assert_close(model(**batch()).logits, expected, atol=1e-5, rtol=1e-5)
    model = wrapped(tie_word_embeddings=tied)
    disk_offload(model, str(tmp_path), torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    torch.testing.assert_close(model(**batch()).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_of_accelerate_loads(tied: bool, tmp_path: Path) -> None:
    from accelerate import Accelerator

    model = wrapped(tie_word_embeddings=tied)
    Accelerator(cpu=True).save_model(model, str(tmp_path), max_shard_size="20KB")
    model.config.save_pretrained(tmp_path)
    loaded, info = MoezooForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert info["missing_keys"] == info["unexpected_keys"] == set()
    assert torch.equal(loaded(**batch()).logits, model(**batch()).logits)


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
