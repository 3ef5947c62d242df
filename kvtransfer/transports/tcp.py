"""Between hosts: streams that threads of the receiver read into its cache. Frames are in ``tcp_socket``."""

from __future__ import annotations

from baton.types import NodeDescription
from kvtransfer.transports.interface import Dial, PlaneSite
from kvtransfer.transports.tcp_receiver import TcpPlane
from kvtransfer.transports.tcp_wire import TcpWire


class Tcp:
    name = "tcp"
    is_one_sided = False
    layerwise_from_bytes = 1 << 20

    def takes(self, *, on_device: bool) -> bool:
        del on_device
        return True

    def reaches(self, mine: NodeDescription, theirs: NodeDescription, *, can_reach_memory: bool) -> bool:
        del mine, theirs, can_reach_memory
        return True

    async def connect(self, dial: Dial) -> TcpWire:
        return await TcpWire.connect(dial.endpoint, dial.token, dial.num_streams, dial.on_lost, dial.access)

    def plane(self, site: PlaneSite) -> TcpPlane:
        return TcpPlane(site)
