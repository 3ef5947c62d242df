"""A worker process with a fake model, for tests that kill it. Arguments: node id, role, listen, ready file, delay.

A delay of "load" is a model that never gets loaded.
"""

import asyncio
import os
import sys
import time
from pathlib import Path

from baton.types import Role
from engine.config import EngineConfig
from engine.scheduler_config import SchedulerConfig
from kvtransfer.config import TransferConfig
from tests.support.relay import fake_load
from worker.config import WorkerConfig
from worker.departure import DrainConfig
from worker.loading import Allocate, LoadedModel
from worker.worker import serve


def endless_load(config: WorkerConfig, allocate: Allocate) -> LoadedModel:
    sys.stdout.write("loading\n")
    sys.stdout.flush()
    while True:
        time.sleep(1.0)


def main() -> None:
    node_id, role, listen, ready_file, delay_s = sys.argv[1:6]
    config = WorkerConfig(
        model=Path("fake"),
        role=Role(role),
        node_id=node_id,
        listen=listen,
        ready_file=Path(ready_file),
        engine=EngineConfig(scheduler=SchedulerConfig(max_batch_tokens=64, max_num_seqs=16)),
        drain=DrainConfig(grace_s=3.0),
        transfer=TransferConfig(transports=tuple(sys.argv[6:]) or ("shm", "tcp")),
    )
    load = endless_load if delay_s == "load" else fake_load(float(delay_s))
    if not asyncio.run(serve(config, load=load)):
        os._exit(0)


if __name__ == "__main__":
    main()
