"""Timings side by side with transformers, in one run each: `python -m benchmarks`."""
