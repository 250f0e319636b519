"""What a type checker knows of the public names: `make types` reads this, nothing runs it."""

from __future__ import annotations

from pathlib import Path
from typing import assert_type

import torch
from torch import Tensor

import moezoo
from moezoo.adapters.sparse import sparse
from moezoo.adapters.upcycle.convert import ConversionReport
from moezoo.models.output import SwitchOutput
from moezoo.recording import Tape

model = moezoo.build("t5-small")
assert_type(model, moezoo.SwitchForConditionalGeneration)
assert_type(model.config, moezoo.SwitchConfig)
assert_type(moezoo.build("t5-small", task="encoder"), moezoo.SwitchEncoderModel)
assert_type(moezoo.build("t5-small", task="model"), moezoo.SwitchModel)
assert_type(moezoo.load("t5", task="conditional_generation"), moezoo.SwitchForConditionalGeneration)
assert_type(moezoo.load("t5", task="encoder"), moezoo.SwitchEncoderModel)
assert_type(moezoo.upcycle("t5", "switch", num_experts=8), ConversionReport)
assert_type(moezoo.upcycle(model, num_experts=8), moezoo.SwitchForConditionalGeneration)
assert_type(moezoo.downcycle("switch", "t5"), Path)
mlp = moezoo.SparseMLP(64, 256, 8)
assert_type(mlp(torch.zeros(2, 64)), Tensor)
with moezoo.record(mlp) as tape:
    assert_type(tape, Tape)
    assert_type(tape.loss(), Tensor)
ids = torch.zeros(2, 3, dtype=torch.int64)
assert_type(model(ids, labels=ids), SwitchOutput)
assert_type(moezoo.plug(model, "*", sparse(8)), list[str])
