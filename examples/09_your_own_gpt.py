"""A GPT of your own with experts in every block, trained on the text that ships with Python.

Run: python examples/09_your_own_gpt.py [STEPS]
"""

import pydoc_data.topics
import sys

import torch
from torch import Tensor, nn

import moezoo

WIDTH, HEADS, LENGTH = 64, 4, 64


class Block(nn.Module):
    """A decoder block of the usual kind; its MLP is a mixture of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        # causal=True refuses routers and policies that would let a token see later ones.
        self.mlp = moezoo.SparseMLP(
            WIDTH, 2 * WIDTH, 4, router="switch", activation="gelu", causal=True
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.norms[0](x)
        x = x + self.attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.norms[1](x))


class Gpt(nn.Module):
    """Bytes (B, L) to the logits (B, L, 256) of the next ones."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, ids: Tensor) -> Tensor:
        mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x)


def main(steps: int) -> None:
    torch.manual_seed(0)
    topics: dict[str, str] = pydoc_data.topics.topics
    text = torch.frombuffer(bytearray("".join(topics.values()).encode()), dtype=torch.uint8).long()
    model = Gpt().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(1, steps + 1):
        begin = torch.randint(len(text) - LENGTH - 1, (16,))
        rows = torch.stack([text[i : i + LENGTH + 1] for i in begin])
        with moezoo.record(model) as tape:
            logits = model(rows[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        (loss + tape.loss()).backward()  # the router's own balancing loss, 0.01 as in its paper
        optimizer.step()
        optimizer.zero_grad()
        if step % (steps // 3) == 0:
            loads = {name: stats.computed for name, stats in tape.stats().items()}
            print(f"step {step}: {loss.item():.2f} nats per byte, tokens by expert {loads}")

    ids = torch.tensor([list(b"The ")])
    for _ in range(40):
        ids = torch.cat([ids, model.eval()(ids[:, -LENGTH:])[:, -1:].argmax(-1)], 1)
    print(bytes(ids[0].tolist()).decode(errors="replace"))
    assert loss < 3.2  # a uniform guess is 5.5


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 150)
