"""Put experts into a model that knows nothing of them: a classifier on torch's own encoder.

Run: python examples/03_plug_into_your_model.py
"""

import torch
from torch import Tensor, nn

import moezoo
from moezoo import sparse


class Classifier(nn.Module):
    """Says whether a sequence holds more of token 1 than of token 2."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, width)
        layer = nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(ids)).mean(1))


def batch(generator: torch.Generator, size: int = 64) -> tuple[Tensor, Tensor]:
    ids = torch.randint(8, (size, 12), generator=generator)
    return ids, ((ids == 1).sum(1) > (ids == 2).sum(1)).long()


def train(model: nn.Module, *, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        ids, labels = batch(generator)
        with moezoo.record(model) as tape:  # collects the routing of every layer inside
            loss = nn.functional.cross_entropy(model(ids), labels)
        (loss + tape.loss({"load_balance": 0.01})).backward()
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    torch.manual_seed(0)
    model = Classifier().eval()
    ids, labels = batch(torch.Generator().manual_seed(2), 512)
    before = model(ids)

    # Every encoder layer's MLP becomes four copies of itself; the function stays.
    names = moezoo.plug(model, nn.TransformerEncoderLayer, sparse(4))
    print("replaced:", ", ".join(names))
    assert torch.allclose(model(ids), before, atol=1e-5)

    train(model.train(), steps=150)
    with torch.no_grad(), moezoo.record(model.eval()) as tape:
        right = (model(ids).argmax(-1) == labels).float().mean()
    print(f"right on new sequences: {float(right):.1%}")
    for layer, stats in tape.stats().items():
        print(f"{layer}: tokens by expert {stats.computed}")

    # The same layer in a model that you write yourself:
    mlp = moezoo.SparseMLP(32, 64, 4, router="expert_choice", activation="gelu")
    assert mlp(torch.randn(2, 12, 32)).shape == (2, 12, 32)
    assert right > 0.8


if __name__ == "__main__":
    main()
