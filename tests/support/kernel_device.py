"""Where tests of Triton's kernels run: on the GPU where there is one, else on the CPU under Triton's interpreter."""

from __future__ import annotations

import os

import torch

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not IS_INTERPRETED else "cpu")
