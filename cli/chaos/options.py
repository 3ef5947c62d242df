"""Settings of `baton chaos` alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from baton.settings import check, setting


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosOptions:
    """Beside these the command has those of `baton up`."""

    model: str = field(
        default="", metadata=setting("--model", "A Hugging Face folder or hub id. Default: the demo's.", short="-m")
    )
    minutes: float = field(default=1.0, metadata=setting("--minutes", "How long faults strike.", most=1e5))
    chaos_seed: int = field(
        default=0,
        metadata=setting("--seed", "Of the faults and of the requests: the same for the same.", least=0, most=2**53),
    )
    streams: int = field(default=16, metadata=setting("--streams", "Requests in flight.", most=4096))
    questions: int = field(
        default=48, metadata=setting("--questions", "Different requests, asked again and again.", most=100_000)
    )
    fault_rate: float = field(default=1.0, metadata=setting("--fault-rate", "Faults a second, about.", most=1000))
    out: Path | None = field(
        default=None,
        metadata=setting("--out", "Folder of the schedule, the report and the logs. Default: chaos-SEED.", short="-o"),
    )

    def __post_init__(self) -> None:
        check(self)
