"""A move of a running sequence to another node, as its flow sees it. Pure.

    asked --lease--> sent --joined, or handed off--> leaving --source's word--> over
      |                |
      '-- refused      '-- not migrated: the sequence goes on at its source

Both nodes may run the sequence for a moment, as an acknowledgement can be lost: its tokens are the same, and the flow
takes them by index. Which node it belongs to is decided here alone, by the first of the target's Joined and the
source's NotMigrated; the other node is told to cancel. Once the source was told to move it, only the source's word ends
the move, so that no word about one move can be taken for one about the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from router.cluster.rebalance import MoveReason


class MoveOutcome(Enum):
    MOVED = "moved"
    # The target had no room, did not answer or was lost: the source was told nothing.
    REFUSED = "refused"
    # The source goes on with it.
    FAILED = "failed"
    # The sequence ended, or its attempt did, before the move was over.
    ENDED = "ended"


class MovePhase(Enum):
    ASKED = "asked"
    SENT = "sent"
    # It is the target's; the source has not said yet that it has let go.
    LEAVING = "leaving"


@dataclass(slots=True)
class Move:
    source_id: str
    target_id: str
    reason: MoveReason
    # When the present wait is over.
    due_s: float
    phase: MovePhase = MovePhase.ASKED
    is_target_lost: bool = False

    @property
    def node_ids(self) -> tuple[str, str]:
        return self.source_id, self.target_id
