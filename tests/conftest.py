"""What every test shares."""

from __future__ import annotations

import os

# Before torch is imported. Tests use small tensors: a second thread saves nothing, and on a busy machine every parallel
# loop would wait for it. Tests about threads ask torch for more.
os.environ.setdefault("OMP_NUM_THREADS", "1")
