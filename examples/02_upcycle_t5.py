"""Turn a dense T5 on disk into a Switch model that computes the same, and take it back again.

Run: python examples/02_upcycle_t5.py [DIRECTORY OF A T5]      (without one, a small T5 is made)
"""

import sys
import tempfile
from pathlib import Path

import torch

import moezoo
from moezoo.adapters.verify import verify


def small_t5(folder: Path) -> Path:
    """A checkpoint as Hugging Face lays it out: config.json and model.safetensors."""
    model = moezoo.build("t5-small", num_layers=2, vocab_size=256, d_ff=512, seed=0)
    moezoo.save(model, folder / "t5")
    return folder / "t5"


def main(source: Path, folder: Path) -> None:
    # Streamed from disk to disk. Half of the MLPs become 8 experts each: the paper's layout.
    report = moezoo.upcycle(source, folder / "switch", num_experts=8, layers="odd")
    plan = report.plan
    print(f"{plan.parameters:,} parameters, {plan.active_parameters:,} of them active per token")
    print(f"expert outputs are scaled by {plan.scale:g}, to undo the router's weight of 1/8")

    # Proof: every tensor accounted for, each layer and the whole model compared.
    print(verify(folder / "switch", source).line)
    dense, switch = moezoo.load(source), moezoo.load(folder / "switch")
    ids = torch.randint(2, 256, (2, 16))
    with torch.no_grad():
        before, after = dense(ids, labels=ids).logits, switch(ids, labels=ids).logits
    difference = float((before - after).abs().max() / before.abs().max())
    print(f"largest difference of logits: {difference:.1e} of the largest logit")
    assert difference < 1e-4

    # And back: the dense tensors, byte for byte.
    moezoo.downcycle(folder / "switch", folder / "dense-again")
    again = moezoo.load(folder / "dense-again").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in dense.state_dict().items())
    print("taken back: every tensor is what it was")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        given = Path(sys.argv[1]) if len(sys.argv) > 1 else small_t5(Path(folder))
        main(given, Path(folder))
