"""What requests cost before and after a change: two commits, a cluster of each, asked in turn.

    python -m bench.commits BEFORE [AFTER] [--minutes 10] [--out FOLDER]

Each commit is extracted into a folder of its own and runs `baton up` there, with one prefill and one decode node and
the demo's model, whose steps are short: what a change costs router and nodes is a large share of them. In each round
both clusters get the same plain requests over HTTP, in an order that alternates: one after the other for the time to
the first token, then many at once for tokens/s. Shown is the median of the rounds' ratios with its 95 % interval; with
the same commit twice it is the error of the method.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import measure
from bench.__main__ import RESULTS
from loadgen.clusters import running

_ROOT = Path(__file__).resolve().parents[1]
_LAST_CHUNK = b"0\r\n\r\n"
_READ_TIMEOUT_S = 60.0
_NUM_ALONE = 40
_NUM_STREAMS = 16
_NUM_TOKENS = 128
_NUM_WARM_UP = 2


@dataclass(slots=True)
class Side:
    """A cluster of one commit, and a value for each round."""

    name: str
    commit: str
    host: str = ""
    port: int = 0
    ttft_ms: list[float] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)


async def request(side: Side, number: int, max_tokens: int) -> float:
    """A streamed request; the seconds to its first token. No prompt begins as another does."""
    prompt = [1 + (number * 31 + i * 7) % 2000 for i in range(100)]
    fields = {"prompt": prompt, "max_tokens": max_tokens, "seed": number, "stream": True, "ignore_eos": True}
    content = json.dumps(fields).encode()
    async with asyncio.timeout(_READ_TIMEOUT_S):
        reader, writer = await asyncio.open_connection(side.host, side.port)
        try:
            began_s = time.perf_counter()
            head = f"POST /v1/completions HTTP/1.1\r\nhost: {side.host}\r\ncontent-length: {len(content)}\r\n\r\n"
            writer.write(head.encode() + content)
            await reader.readuntil(b"data: ")
            first_s = time.perf_counter() - began_s
            block = b""
            while not block.endswith(_LAST_CHUNK):
                read = await reader.read(1 << 16)
                if not read:
                    raise SystemExit(f"{side.name}: a stream broke off")
                block = block[-len(_LAST_CHUNK) :] + read
        finally:
            writer.close()
    return first_s


async def one_round(side: Side, number: int, *, is_kept: bool) -> None:
    alone = [await request(side, number * 1000 + i, 8) for i in range(_NUM_ALONE)]
    began_s = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for i in range(_NUM_STREAMS):
            group.create_task(request(side, number * 1000 + 500 + i, _NUM_TOKENS))
    taken_s = time.perf_counter() - began_s
    if is_kept:
        side.ttft_ms.append(1000 * statistics.median(alone))
        side.tokens_per_s.append(_NUM_STREAMS * _NUM_TOKENS / taken_s)


async def compare(before: Side, after: Side, run_s: float) -> None:
    with tempfile.TemporaryDirectory(prefix="baton-commits-") as folder:
        async with contextlib.AsyncExitStack() as stack:
            for side in (before, after):
                tree = _extracted(side.commit, Path(folder) / side.name)
                await stack.enter_async_context(_started(side, tree, Path(folder)))
            end_s, number = time.monotonic() + run_s, 0
            while number < _NUM_WARM_UP + 2 or time.monotonic() < end_s:
                for side in (before, after) if number % 2 else (after, before):
                    await one_round(side, number, is_kept=number >= _NUM_WARM_UP)
                number += 1


def _extracted(commit: str, folder: Path) -> Path:
    archive = folder.with_suffix(".tar")
    _git("archive", "--format=tar", f"--output={archive}", commit)
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    return folder


@contextlib.asynccontextmanager
async def _started(side: Side, tree: Path, folder: Path) -> AsyncIterator[None]:
    ready = folder / f"{side.name}.json"
    python = (sys.executable, "-P", str(tree / "cli" / "__main__.py"))
    options = ("--http-port", "0", "--grpc-port", "0", "--prefill", "1", "--decode", "1", "--disaggregation", "always")
    model = ("--model", str(tree / "demo" / "model"), "--prefix-cache", "off", "--ready-file", str(ready))
    async with running(side.name, (*python, "up", *options, *model), ready, folder / f"{side.name}.log") as said:
        side.host, _, port = str(said["http"]).removeprefix("http://").partition(":")
        side.port = int(port)
        yield


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        raise SystemExit(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def row(what: str, before: list[float], after: list[float]) -> dict[str, Any]:
    percent, low, high = measure.percent_more(after, before)
    return {
        "what": what, "before": round(statistics.median(before), 3), "after": round(statistics.median(after), 3),
        "more_percent": round(percent, 2), "from_percent": round(low, 2), "to_percent": round(high, 2),
        "rounds": len(before), "samples_before": before, "samples_after": after,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.commits", description="Requests before and after a change.")
    parser.add_argument("before", help="a commit")
    parser.add_argument("after", nargs="?", default="HEAD", help="a commit; default: HEAD")
    parser.add_argument("--minutes", type=float, default=10.0, help="of rounds, beside half a minute to start")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    args = parser.parse_args()
    began = datetime.now(UTC)
    commits = [_git("rev-parse", "--short=12", f"{commit}^{{commit}}") for commit in (args.before, args.after)]
    before, after = Side("before", commits[0]), Side("after", commits[1])
    asyncio.run(compare(before, after, 60 * args.minutes))
    rows = [
        row("TTFT, ms", before.ttft_ms, after.ttft_ms),
        row("tokens/s", before.tokens_per_s, after.tokens_per_s),
    ]
    for found in rows:
        print({name: value for name, value in found.items() if not name.startswith("samples")})
    record = {"date": began.isoformat(timespec="seconds"), "machine": measure.machine(), "before": before.commit,
              "after": after.commit, "streams": _NUM_STREAMS, "tokens": _NUM_TOKENS, "rows": rows}  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"commits-{began.strftime('%Y-%m-%dT%H%M%SZ')}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"saved {path}")


if __name__ == "__main__":
    main()
