"""Tests of what only a GPU shows: they are part of the suite where there is one."""

from __future__ import annotations

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
