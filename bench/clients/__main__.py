"""``python -m bench.clients`` is ``python -m bench clients``."""

from __future__ import annotations

import os
import sys

from bench.clients.command import main
from bench.clients.table import RESULTS

if __name__ == "__main__":
    # Set before grpc is imported.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    main(sys.argv[1:], RESULTS)
