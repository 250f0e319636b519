"""Checkpoints and other libraries: containers, families, upcycling, plugs."""
