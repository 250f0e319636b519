"""Checkpoints and other libraries: containers, families, upcycling, plugs."""

if __name__ != "moezoo.adapters":  # under two names, every component would register twice
    raise ImportError("this folder is a part of moezoo: import moezoo.adapters")


def register_transformers() -> None:
    """Let the Auto classes of transformers know `model_type: moezoo` (extra `hf`)."""
    from moezoo.adapters.hf import register

    register()
