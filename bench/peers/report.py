"""Makes tables from the rows of a run: ratios first, medians over rounds, memory regimes kept apart."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.peers.servers import VLLM
from loadgen.samples import Samples

OURS = "baton"
Rows = Sequence[Mapping[str, Any]]


def summary(rows: Rows) -> dict[str, list[dict[str, Any]]]:
    """Tables by name; each row a mapping."""
    return {
        "engines": [row for cell in _names(rows, "sample", "cell") for row in _of_cell(rows, cell)],
        "servers": [row for load in _names(rows, "load", "load") for row in _of_load(rows, load)],
        "failures": [_less_kind(row) for row in rows if row["kind"] == "failure"],
    }


def markdown(rows: Rows) -> str:
    """The tables of a run."""
    parts = []
    tables = summary(rows)
    if tables["engines"]:
        parts.append(_table(_engine_lines(tables["engines"])))
    if tables["servers"]:
        parts.append(_table(_server_lines(tables["servers"])))
    if tables["failures"]:
        parts.append(
            _table([("failed", "at", "why"), *((f["who"], f["stage"], _cell(f["reason"])) for f in tables["failures"])])
        )
    return "\n\n".join(parts)


def _less_kind(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "kind"}


def _names(rows: Rows, kind: str, key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows if row["kind"] == kind))


def _of_cell(rows: Rows, cell: str) -> Iterable[dict[str, Any]]:
    """The figures over all rounds and, if there was more than one regime, for each regime."""
    samples = [row for row in rows if row["kind"] == "sample" and row["cell"] == cell]
    rounds = _by_round(samples)
    yield _engine_row(cell, "all", rounds)
    regimes = {number: _regime_of(found.values()) for number, found in rounds.items()}
    if len(set(regimes.values())) > 1:
        for name in sorted(set(regimes.values())):
            yield _engine_row(cell, name, {n: found for n, found in rounds.items() if regimes[n] == name})


def _by_round(samples: Rows) -> dict[int, dict[str, Mapping[str, Any]]]:
    rounds: dict[int, dict[str, Mapping[str, Any]]] = {}
    for sample in samples:
        rounds.setdefault(sample["round"], {})[sample["who"]] = sample
    return rounds


def _regime_of(samples: Iterable[Mapping[str, Any]]) -> str:
    """The regime of most samples of a round."""
    return str(statistics.mode(sample["regime"] for sample in samples))


def _engine_row(cell: str, regime: str, rounds: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    names = list(dict.fromkeys(name for found in rounds.values() for name in found))
    speeds = {name: [f[name]["tokens_s"] for f in rounds.values() if name in f] for name in names}
    ratios, agreed, compared = [], 0, 0
    for found in rounds.values():
        peers = [sample for name, sample in found.items() if name != OURS]
        if OURS in found and peers:
            ratios.append(found[OURS]["tokens_s"] / max(peer["tokens_s"] for peer in peers))
            for peer in peers:
                pairs = list(zip(peer["first_tokens"], found[OURS]["first_tokens"], strict=True))
                agreed += sum(a == b for a, b in pairs)
                compared += len(pairs)
    ours = [found[OURS] for found in rounds.values() if OURS in found]
    everyone = [sample for found in rounds.values() for sample in found.values()]
    peer_medians = {name: statistics.median(speeds[name]) for name in names if name != OURS}
    return {
        "cell": cell,
        "regime": regime,
        "rounds": len(rounds),
        "ratio": _median(ratios),
        "samples_ratio": ratios,
        "best_peer": max(peer_medians, key=lambda name: peer_medians[name], default=None),
        "tokens_s": {name: statistics.median(speeds[name]) for name in names},
        "samples_tokens_s": speeds,
        "flop_share": _median([sample["flop_share"] for sample in ours]),
        "bandwidth_share": _median([sample["bandwidth_share"] for sample in ours]),
        "read_gb_s": _median([sample["read_gb_s"] for sample in everyone]),
        "gflop_s": _median([sample["gflop_s"] for sample in everyone]),
        "others_cores": max(sample["others_cores"] for sample in everyone),
        "first_tokens_as_ours": f"{agreed}/{compared}" if compared else None,
    }


def _of_load(rows: Rows, load: str) -> Iterable[dict[str, Any]]:
    found = [row for row in rows if row["kind"] == "load" and row["load"] == load]
    theirs = {row["round"]: row["tokens_s"] for row in found if row["who"] == VLLM}
    for who in dict.fromkeys(row["who"] for row in found):
        mine = [row for row in found if row["who"] == who]
        # Percentiles are over the requests of all rounds: one round has too few.
        ttft = Samples.of(value for row in mine for value in row["ttft_s"])
        gaps = Samples.of(value for row in mine for value in row["gaps_ms"])
        yield {
            "load": load,
            "server": who,
            "ratio": _median([row["tokens_s"] / theirs[row["round"]] for row in mine if theirs.get(row["round"])]),
            "tokens_s": statistics.median(row["tokens_s"] for row in mine),
            "samples_tokens_s": [row["tokens_s"] for row in mine],
            "requests": sum(row["requests"] for row in mine),
            "errors": sum(row["errors"] for row in mine),
            "cut": sum(row["cut"] for row in mine),
            "ttft_p50_s": ttft.percentile(0.5) if ttft.values else None,
            "ttft_p99_s": ttft.percentile(0.99) if ttft.values else None,
            "gap_p50_ms": gaps.percentile(0.5) if gaps.values else None,
            "gap_p99_ms": gaps.percentile(0.99) if gaps.values else None,
            "gap_max_ms": max(gaps.values) if gaps.values else None,
            "read_gb_s": [round(row["read_gb_s"], 1) for row in mine],
            "others_cores": max(row["others_cores"] for row in mine),
        }


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _engine_lines(rows: Rows) -> list[tuple[str, ...]]:
    names = list(dict.fromkeys(name for row in rows for name in row["samples_tokens_s"]))
    head = (
        "tokens/s",
        "memory",
        "Baton / best peer",
        *names,
        "of FLOP/s",
        "of bandwidth",
        "GB/s",
        "GFLOP/s",
        "others' cores",
    )
    lines = [head]
    for row in rows:
        speeds = (" ".join(f"{value:.0f}" for value in row["samples_tokens_s"].get(name, ())) or "-" for name in names)
        ratio = f"**{_number(row['ratio'])}** ({' '.join(_number(value) for value in row['samples_ratio'])})"
        shares = (_percent(row["flop_share"]), _percent(row["bandwidth_share"]))
        beside = (f"{row['read_gb_s']:.0f}", f"{row['gflop_s']:.0f}", f"{row['others_cores']:.2f}")
        lines.append((row["cell"], row["regime"], ratio, *speeds, *shares, *beside))
    return lines


def _server_lines(rows: Rows) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = [
        (
            "load",
            "server",
            "of vLLM's",
            "tokens/s",
            "TTFT p50 / p99 s",
            "gap p50 / p99 / max ms",
            "GB/s",
            "errors, cut",
            "others' cores",
        )
    ]
    for row in rows:
        ttft = f"{_number(row['ttft_p50_s'])} / {_number(row['ttft_p99_s'])}"
        gaps = " / ".join(
            "-" if row[key] is None else f"{row[key]:.0f}" for key in ("gap_p50_ms", "gap_p99_ms", "gap_max_ms")
        )
        speeds = f"{row['tokens_s']:.1f} ({' '.join(f'{value:.1f}' for value in row['samples_tokens_s'])})"
        memory = " ".join(f"{value:.0f}" for value in row["read_gb_s"])
        lost = f"{row['errors']}, {row['cut']}"
        lines.append(
            (
                row["load"],
                row["server"],
                _number(row["ratio"]),
                speeds,
                ttft,
                gaps,
                memory,
                lost,
                f"{row['others_cores']:.2f}",
            )
        )
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value * 100:.0f} %"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _table(lines: Sequence[Sequence[str]]) -> str:
    head, *rest = lines
    rule = "|" + "---|" * len(head)
    return "\n".join(["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(line) + " |" for line in rest)])
