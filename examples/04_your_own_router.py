"""A router of your own: register it, let the kit check it, and build a model with it by name.

Run: python examples/04_your_own_router.py   (needs hypothesis)
"""

import torch
from torch import nn

import moezoo
from moezoo.functional.assign import token_choice
from moezoo.functional.gates import gate_logits
from moezoo.records import Routing, Tokens
from moezoo.routers import Router
from moezoo.testing import InvariantBroken, check_router


@moezoo.routers.register("temperature")
class TemperatureRouter(Router):
    """Top-1 routing by probabilities at a temperature."""

    def __init__(self, d_model: int, num_experts: int, *, temperature: float = 2.0) -> None:
        super().__init__()
        self.d_model, self.num_experts, self.temperature = d_model, num_experts, temperature
        self.classifier = nn.Linear(d_model, num_experts, bias=False)

    def forward(self, tokens: Tokens) -> Routing:
        logits = gate_logits(tokens.x, self.classifier.weight) / self.temperature
        probs = logits.softmax(dim=-1)
        assignment = token_choice(probs, probs, 1, tokens)
        return Routing(assignment, logits=logits, probs=probs, real=tokens.real)


class LeakyRouter(TemperatureRouter):
    """The same, but each token is compared with the mean of all tokens, later ones too."""

    def forward(self, tokens: Tokens) -> Routing:
        mean = tokens.x.mean(dim=0, keepdim=True)
        return super().forward(Tokens(tokens.x - mean, tokens.ids, tokens.real, tokens.group_size))


check_router("temperature", examples=25)
print("temperature: every promise is kept\n")

try:
    check_router(LeakyRouter, examples=25)
except InvariantBroken as error:
    print(error)

model = moezoo.build(
    "switch-base-8", router={"name": "temperature", "temperature": 1.5},
    d_model=32, d_kv=8, d_ff=64, num_heads=4, num_layers=2, vocab_size=64,
)  # fmt: skip
ids = torch.randint(2, 64, (2, 8))
output = model(ids, labels=ids)
print(f"\na model with it: loss {output.loss.item():.3f}")
