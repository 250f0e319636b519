"""The T5/Switch architecture: encoder-decoder, conditional generation, encoder only."""

from moezoo.models.output import SwitchOutput
from moezoo.models.switch import SwitchEncoderModel, SwitchForConditionalGeneration, SwitchModel

__all__ = ["SwitchEncoderModel", "SwitchForConditionalGeneration", "SwitchModel", "SwitchOutput"]
