"""Label smoothing (arXiv 1512.00567, section 7) as what a model is trained on."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from moezoo.models.output import SwitchOutput
from moezoo.models.switch import cross_entropy
from moezoo.training.loop import Batch


@dataclass(frozen=True)
class Smoothed:
    """The usual objective with smooth targets: called with a model and a batch it gives the model's
    output, whose loss has `share` of every target spread over all tokens. Router losses are as
    ever, and `losses["cross_entropy"]` is still that with the labels.
    """

    share: float

    def __call__(self, model: nn.Module, batch: Batch) -> SwitchOutput:
        output: SwitchOutput = model(**batch)
        assert output.loss is not None and output.logits is not None
        smooth = cross_entropy(output.logits, batch["labels"], smoothing=self.share)
        return replace(output, loss=output.loss - output.losses["cross_entropy"] + smooth)
