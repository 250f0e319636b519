"""Build Switch models by name and of your own size, train a step, and generate.

Run: python examples/01_build.py
"""

import torch

import moezoo


def published() -> None:
    """The paper's models; on "meta" even the largest costs no memory."""
    for name in ("switch-base-8", "switch-base-256", "switch-c-2048"):
        model = moezoo.build(name, device="meta")
        count = sum(parameter.numel() for parameter in model.parameters())
        print(f"{name:<16} {count / 1e9:8.2f} B parameters")


def your_own() -> torch.nn.Module:
    """A small one, with a router from the zoo and two experts per token."""
    config = moezoo.SwitchConfig(
        vocab_size=100,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_heads=4,
        num_layers=2,
        num_experts=4,
        router={"name": "top_k", "k": 2},
        capacity="dropless",
    )
    return moezoo.build(config, seed=0)


def train(model: torch.nn.Module, *, steps: int = 60) -> None:
    """Learn to copy the source backwards."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for step in range(steps):
        source = torch.randint(2, 100, (16, 8), generator=generator)
        output = model(source, labels=source.flip(1))
        output.loss.backward()  # cross entropy + 0.01 * load balance, as in the paper
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == steps - 1:
            parts = ", ".join(
                f"{name} {float(v.detach()):.3f}" for name, v in output.losses.items()
            )
            print(f"step {step:>3}: {parts}")
    model.eval()


def look_inside(model: torch.nn.Module) -> None:
    """What the routers do, layer by layer."""
    with torch.no_grad(), moezoo.record(model) as tape:
        model.generate(torch.randint(2, 100, (4, 8)), max_new_tokens=8)
    for layer, stats in tape.stats().items():
        print(f"{layer:<22} load {stats.load}, dropped {stats.dropped:.1%}")


if __name__ == "__main__":
    torch.manual_seed(0)
    published()
    model = your_own()
    train(model)
    look_inside(model)
