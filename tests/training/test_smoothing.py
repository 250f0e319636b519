"""Smooth labels change the cross entropy, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import moezoo
from moezoo.models.switch import cross_entropy
from moezoo.training.recipes import TrainingRecipe
from moezoo.training.smoothing import Smoothed


def switch_and_batch() -> tuple[Any, dict[str, torch.Tensor]]:
    config = moezoo.SwitchConfig(
        vocab_size=60, d_model=16, d_kv=4, d_ff=24, num_heads=2, num_layers=2, num_experts=4
    )
    ids = torch.randint(2, 60, (3, 6), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[1, 3:] = -100
    return moezoo.build(config, seed=0), {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_share_of_every_target_goes_to_all_tokens(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 5, 9, dtype=dtype)
    labels = torch.randint(0, 9, (2, 5))
    labels[0, 2:] = -100
    wide = logits.to(torch.promote_types(dtype, torch.float32))
    real = labels != -100
    targets = 0.7 * F.one_hot(labels[real], 9) + 0.3 / 9
    expected = -(targets * wide[real].log_softmax(-1)).sum(-1).mean()
    found = cross_entropy(logits, labels, smoothing=0.3)
    torch.testing.assert_close(found, expected.to(found.dtype))
    assert cross_entropy(logits, torch.full_like(labels, -100), smoothing=0.3) == 0


def test_router_losses_and_the_reported_cross_entropy_stay() -> None:
    model, batch = switch_and_batch()
    plain, smooth = model(**batch), Smoothed(0.2)(model, batch)
    assert torch.equal(smooth.losses["cross_entropy"], plain.losses["cross_entropy"])
    router = plain.loss - plain.losses["cross_entropy"]
    assert router > 0
    expected = cross_entropy(plain.logits, batch["labels"], smoothing=0.2) + router
    torch.testing.assert_close(smooth.loss, expected)
    assert torch.equal(Smoothed(0.0)(model, batch).loss, plain.loss)


def test_a_share_beyond_one_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from moezoo.cli import main

    with pytest.raises(moezoo.MoezooError, match="label_smoothing"):
        TrainingRecipe(label_smoothing=1.5)
    code = main(
        ["finetune", str(tmp_path), str(tmp_path / "out"), "--pairs", "none", "--steps", "1",
         "--label-smoothing", "2"]
    )  # fmt: skip
    assert code == 3
    assert not (tmp_path / "out").exists()
