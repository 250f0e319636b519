"""Triton has wheels for Linux alone: elsewhere its tests are none of the suite's."""

from __future__ import annotations

import sys

collect_ignore = [] if sys.platform == "linux" else ["test_triton.py"]
