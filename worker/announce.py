"""What a worker says of itself: its description for routers and peers, and where it is reached for its starter."""

from __future__ import annotations

import json
import os
import secrets
import socket
from dataclasses import replace

from baton import PROTOCOL_VERSION, __version__
from baton.address import as_dialled
from baton.ready import write_json_atomically
from baton.types import NodeDescription
from kvtransfer.config import TransferConfig
from kvtransfer.host import host_id
from worker.config import WorkerConfig
from worker.loading import LoadedModel


def describe(
    config: WorkerConfig, model: LoadedModel, address: str, metrics_address: str, transfer: TransferConfig
) -> NodeDescription:
    # Two hosts' workers that listen everywhere must not share a name.
    where = as_dialled(address, f"{socket.gethostname()}:0")
    return NodeDescription(
        node_id=config.node_id or f"{config.role.value}-{where}",
        incarnation=secrets.randbits(63) | 1,
        home_role=config.role,
        address=address,
        model=replace(model.description, name=config.model_name) if config.model_name else model.description,
        kv_layout=model.layout,
        protocol_version=PROTOCOL_VERSION,
        pid=os.getpid(),
        host_id=host_id(),
        transports=transfer.transport_names,
        device=model.device,
        kernels=model.kernels,
        software_version=__version__,
        metrics_address=metrics_address,
        prefix_cache=model.prefix_caching if config.engine.scheduler.has_prefix_cache else None,
        tbt_target_s=config.engine.scheduler.tbt_target_s,
    )


def announce(node: NodeDescription, config: WorkerConfig) -> None:
    """To ``ready_file`` and ``ready_fd``, once everything is served."""
    facts = {"node_id": node.node_id, "role": node.home_role.value, "pid": node.pid, "address": node.address}
    facts["metrics"] = node.metrics_address
    if config.ready_file is not None:
        write_json_atomically(config.ready_file, facts)
    if config.ready_fd is not None:
        with os.fdopen(config.ready_fd, "w") as pipe:
            pipe.write(json.dumps(facts) + "\n")
