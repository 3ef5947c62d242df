"""A worker process with a fake model, for tests that kill it. Arguments: node id, role, listen, ready file, delay."""

import asyncio
import sys
from pathlib import Path

from relay_harness import fake_load

from baton.types import Role
from cli.worker import WorkerConfig, serve


def main() -> None:
    node_id, role, listen, ready_file, delay_s = sys.argv[1:6]
    config = WorkerConfig(
        model=Path("fake"),
        role=Role(role),
        node_id=node_id,
        listen=listen,
        ready_file=Path(ready_file),
        max_batch_tokens=64,
        max_num_seqs=16,
        grace_s=3.0,
        transports=tuple(sys.argv[6:]) or ("shm", "tcp"),
    )
    asyncio.run(serve(config, load=fake_load(float(delay_s))))


if __name__ == "__main__":
    main()
