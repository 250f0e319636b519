"""Distillation of a Switch teacher into a dense student (Switch Transformers, section 4.2)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moezoo.building import build
from moezoo.config import SwitchConfig
from moezoo.errors import ConfigError
from moezoo.models.output import SwitchOutput
from moezoo.training.batches import IGNORED

TEACHER_WEIGHT = 0.25


@dataclass(frozen=True)
class Distillation:
    """What a student is trained on: the words of the text, and what the teacher expected there.

    Called with a student and a batch it gives the student's output, whose loss is
    (1 - weight) * cross entropy with the labels + weight * cross entropy with the teacher's
    probabilities, plus the student's own router losses; the second is `losses["teacher"]`. The
    teacher runs in evaluation mode and gets no gradient.

    Args:
        teacher: a model with the student's vocabulary. weight: the teacher's share (0.25).
    """

    teacher: nn.Module
    weight: float = TEACHER_WEIGHT

    def __post_init__(self) -> None:
        if not 0.0 <= self.weight <= 1.0:
            hint = "The paper mixes 0.25 of the teacher with 0.75 of the labels."
            raise ConfigError(
                "weight lies in [0, 1]", field="teacher_weight", found=self.weight, hint=hint
            )
        self.teacher.eval()

    def __call__(self, student: nn.Module, batch: dict[str, Tensor]) -> SwitchOutput:
        """The student's output on a batch of input_ids, attention_mask and labels."""
        with torch.no_grad():
            expected = self.teacher(**batch).logits
        output: SwitchOutput = student(**batch)
        assert output.logits is not None and output.loss is not None
        soft = soft_cross_entropy(output.logits, expected, batch["labels"])
        hard = output.losses["cross_entropy"]
        loss = output.loss + self.weight * (soft - hard)
        return replace(output, loss=loss, losses={**output.losses, "teacher": soft})


def soft_cross_entropy(logits: Tensor, expected: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of the student's logits (B, L, V) with the teacher's probabilities, softmax of
    `expected` (B, L, V), in float32: the mean over labels (B, L) that are not -100, 0 without any.
    """
    real = labels != IGNORED
    probs = expected.float().softmax(-1)
    each = -(probs * F.log_softmax(logits.float(), -1)).sum(-1)
    return (each * real).sum() / real.sum().clamp(min=1)


def student_of(teacher: nn.Module, *, seed: int | None = None, **overrides: Any) -> nn.Module:
    """A dense model of the teacher's sizes that starts from all of its weights but routers and
    experts; where those stood it has feed-forward layers with fresh weights.

    Args:
        seed: of the fresh weights. overrides: fields of SwitchConfig.

    Raises ConfigError when the teacher has no experts.
    """
    config: Any = teacher.config
    if not config.num_experts:
        hint = "Pass a Switch checkpoint; a dense one can be trained on as it is."
        raise ConfigError("the teacher has no experts", field="teacher", hint=hint)
    student: nn.Module = build(dense(config), seed=seed, **overrides)
    own, theirs = student.state_dict(), teacher.state_dict()
    shared = {n: t for n, t in theirs.items() if n in own and own[n].shape == t.shape}
    student.load_state_dict(shared, strict=False)
    return student.to(next(teacher.parameters()).device)


def dense(config: SwitchConfig) -> SwitchConfig:
    """The config without experts and everything that belongs to them."""
    plain = SwitchConfig()
    names = ("router", "router_bias", "capacity", "experts", "shared_expert", "router_losses")
    return config.replace(num_experts=0, **{name: getattr(plain, name) for name in names})


def check_student(student: nn.Module, teacher: nn.Module) -> None:
    """Raises ConfigError unless both predict the same vocabulary."""
    ours: Any = student.config
    theirs: Any = teacher.config
    if ours.vocab_size != theirs.vocab_size:
        raise ConfigError(
            "teacher and student differ in vocabulary",
            field="teacher",
            expected=ours.vocab_size,
            found=theirs.vocab_size,
        )
