"""Experts in a vision transformer: transformers' ViT here, timm's in the same way.

Run: python examples/10_vision_transformer.py        (pip install '.[hf]')

With timm: model = timm.create_model("vit_tiny_patch16_224"), and the pattern "blocks.*.mlp".
"""

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

import moezoo
from moezoo.adapters.sparse import sparse


def batch(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise with a bright square in one of four corners, which is the class."""
    labels = torch.randint(4, (size,), generator=generator)
    images = 0.3 * torch.randn(size, 3, 16, 16, generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = 8 * (label // 2), 8 * (label % 2)
        image[:, row + 2 : row + 6, column + 2 : column + 6] += 1.0
    return images, labels


def main() -> None:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
        num_labels=4,
    )
    model = ViTForImageClassification(config).eval()
    generator = torch.Generator().manual_seed(1)
    images, labels = batch(128, generator)
    before = model(images).logits

    # Half of the blocks become sparse: "V-MoE" (arXiv 2106.05974) takes every other one, too.
    names = moezoo.plug(model, "vit.layers.1.mlp", sparse(4))
    print("replaced:", ", ".join(names))
    assert torch.allclose(model(images).logits, before, atol=1e-5)

    optimizer = torch.optim.AdamW(model.train().parameters(), lr=2e-3)
    for _ in range(60):
        images, labels = batch(64, generator)
        with moezoo.record(model) as tape:
            loss = nn.functional.cross_entropy(model(images).logits, labels)
        (loss + tape.loss()).backward()
        optimizer.step()
        optimizer.zero_grad()

    images, labels = batch(256, generator)
    with torch.no_grad(), moezoo.record(model.eval()) as tape:
        right = float((model(images).logits.argmax(-1) == labels).float().mean())
    print(f"right on new images: {right:.1%}")
    for layer, stats in tape.stats().items():
        print(f"{layer}: patches by expert {stats.computed}")
    assert right > 0.9


if __name__ == "__main__":
    main()
