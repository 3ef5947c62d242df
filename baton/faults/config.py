"""Settings of fault injection: files and folders that are named when a process starts, and nothing that a peer says."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from baton.errors import BadConfig
from baton.faults.plan import OPTION, Plan
from baton.ready import write_json_atomically
from baton.settings import setting

_MAX_RUNS = 10_000


@dataclass(frozen=True, slots=True)
class FaultsConfig:
    """Without a ``file`` nothing strikes."""

    file: Path | None = field(
        default=None,
        metadata=setting(
            OPTION,
            "For tests: messages are lost, KV is damaged, processes die as this schedule says, a file in TOML or a "
            "folder of them (docs/faults.md).",
        ),
    )
    record: Path | None = field(
        default=None,
        metadata=setting(
            "--faults-record",
            "Folder where each process writes the faults that it drew, as a schedule that strikes the same again. "
            "Default: beside the schedule, with -drawn behind its name.",
        ),
    )
    # Times of the schedule count from when this file is written, by `baton up` when all is ready; none: from when the
    # process serves.
    clock: Path | None = None

    def plan(self) -> Plan:
        """Raises BadConfig."""
        return Plan() if self.file is None else Plan.load(self.file)

    @property
    def folder(self) -> Path:
        """Of the record."""
        assert self.file is not None
        return self.record or self.file.with_name(f"{self.file.stem}-drawn")

    def of_run(self) -> FaultsConfig:
        """For several processes together: a folder that does not exist yet, and a clock in it. Raises BadConfig for a
        schedule that is wrong."""
        if self.file is None:
            return self
        if not self.plan().rules:
            raise BadConfig(f"{OPTION}: {self.file} has no [[fault]], expected at least one", param="file")
        wanted = self.folder.resolve()
        names = (wanted, *(wanted.with_name(f"{wanted.name}-{i}") for i in range(2, _MAX_RUNS)))
        folder = next((path for path in names if not path.exists()), None)
        if folder is None:
            raise BadConfig(f"{OPTION}: {wanted} is there {_MAX_RUNS} times, expected a new folder", param="record")
        return replace(self, file=self.file.resolve(), record=folder, clock=self.clock or folder / "began.json")

    def begin(self, now_s: float) -> None:
        """From now on times count, for processes of this machine: ``now_s`` is of its monotonic clock."""
        assert self.clock is not None
        self.clock.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomically(self.clock, now_s)
