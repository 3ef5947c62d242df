"""Runs third-party load tools against a cluster and compares their figures with the router's own for the same requests.

A tap between them (bench.tap) records when bytes pass. The difference between the tool's first-token time and the tap's
is the tool's own delay; the difference between the tap's and the router's is the network and the router's reading and
writing.

    python -m bench.load_tools --guidellm PATH/bin/guidellm --aiperf PATH/bin/aiperf

Each tool needs an environment of its own (pip install guidellm, pip install aiperf: a gigabyte or more each); the
`openai` package is the third tool. None needs a network: the tokenizer is the model's folder.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

import httpx
import openai
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from bench import measure
from bench.__main__ import RESULTS, show
from bench.cluster import NO_PREFIX_CACHE, cluster
from loadgen import machine

_TOOL_TIMEOUT_S = 300.0
_MODEL = Path(__file__).resolve().parents[1] / "demo" / "model"
_TTFT = "baton_time_to_first_token_seconds"
_E2E = "baton_request_duration_seconds"
# Two names of the interval between tokens are in use; the first one found counts.
_TBT = ("baton_tbt_seconds", "baton_time_between_tokens_seconds")


@dataclass(frozen=True, slots=True)
class Load:
    num_requests: int
    concurrency: int
    prompt_tokens: int
    output_tokens: int
    seed: int = 1


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of one side for one run. Means, since a histogram has no other exact figure."""

    num_requests: int
    num_failed: int
    output_tokens: int
    ttft_mean_ms: float
    # None: the router's histogram has only buckets.
    ttft_median_ms: float | None
    itl_mean_ms: float
    e2e_mean_ms: float


def guidellm(command: Path, base_url: str, load: Load, folder: Path) -> tuple[Figures, float]:
    report = folder / "guidellm.json"
    _run(
        [
            *(str(command), "run", "--disable-progress"),
            *("--backend", f"kind=openai_http,target={base_url},model={_MODEL.name},request_format=/v1/completions"),
            *("--profile", f"kind=concurrent,streams={load.concurrency}"),
            *("--constraint", f"kind=max_requests,count={load.num_requests}"),
            *("--tokenizer", f"kind=hf_auto,model={_MODEL}"),
            *("--data", f"kind=synthetic_text,prompt_tokens={load.prompt_tokens},output_tokens={load.output_tokens}"),
            *("--seed", f"kind=static,value={load.seed}", "--output", f"kind=json,path={report}"),
        ],
        folder / "guidellm.log",
    )
    found = json.loads(report.read_text())["benchmarks"][0]
    metrics = found["metrics"]
    totals = metrics["request_totals"]
    figures = Figures(
        num_requests=totals["successful"],
        num_failed=totals["errored"] + totals["incomplete"],
        output_tokens=round(metrics["output_token_count"]["successful"]["total_sum"]),
        ttft_mean_ms=metrics["time_to_first_token_ms"]["successful"]["mean"],
        ttft_median_ms=metrics["time_to_first_token_ms"]["successful"]["median"],
        itl_mean_ms=metrics["inter_token_latency_ms"]["successful"]["mean"],
        e2e_mean_ms=metrics["request_latency"]["successful"]["mean"] * 1e3,
    )
    return figures, found["duration"]


def aiperf(command: Path, base_url: str, load: Load, folder: Path) -> tuple[Figures, float]:
    _run(
        [
            *(str(command), "profile", "-m", _MODEL.name, "--url", base_url, "--tokenizer", str(_MODEL)),
            *("--endpoint-type", "completions", "--streaming", "--ui", "none"),
            *("--isl", str(load.prompt_tokens), "--isl-stddev", "0", "--osl", str(load.output_tokens)),
            *("--osl-stddev", "0", "--extra-inputs", "ignore_eos:true", "temperature:0"),
            *("--concurrency", str(load.concurrency), "--request-count", str(load.num_requests)),
            *("--random-seed", str(load.seed), "--no-server-metrics", "--no-gpu-telemetry"),
            *("--workers-max", "1", "--record-processor-service-count", "1"),
            *("--output-artifact-dir", str(folder / "aiperf")),
        ],
        folder / "aiperf.log",
    )
    found = json.loads((folder / "aiperf" / "profile_export_aiperf.json").read_text())
    failed = found.get("error_request_count") or {"avg": 0}
    figures = Figures(
        num_requests=round(found["request_count"]["avg"]),
        num_failed=round(failed["avg"]),
        output_tokens=round(found["total_output_tokens"]["avg"]),
        ttft_mean_ms=found["time_to_first_token"]["avg"],
        ttft_median_ms=found["time_to_first_token"]["p50"],
        itl_mean_ms=found["inter_token_latency"]["avg"],
        e2e_mean_ms=found["request_latency"]["avg"],
    )
    return figures, found["benchmark_duration"]["avg"]


def openai_package(base_url: str, load: Load) -> tuple[Figures, float]:
    return asyncio.run(_openai_package(base_url, load))


async def _openai_package(base_url: str, load: Load) -> tuple[Figures, float]:
    gate = asyncio.Semaphore(load.concurrency)
    rng = Random(load.seed)
    prompts = [[rng.randrange(100, 2000) for _ in range(load.prompt_tokens)] for _ in range(load.num_requests)]
    async with openai.AsyncOpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0) as client:
        # The package's first-use imports and look-ups are not the server's time.
        await client.models.list()

        async def one(prompt: list[int]) -> tuple[float, float, float, int]:
            async with gate:
                started = time.perf_counter()
                first: float | None = None
                last, num_tokens = started, 0
                stream = await client.completions.create(
                    model=_MODEL.name, prompt=prompt, max_tokens=load.output_tokens, temperature=0, stream=True,
                    extra_body={"ignore_eos": True, "return_token_ids": True},
                )  # fmt: skip
                async for chunk in stream:
                    ids: list[int] = getattr(chunk.choices[0], "token_ids", None) or []
                    if ids:
                        last = time.perf_counter()
                        first = last if first is None else first
                        num_tokens += len(ids)
                if first is None:
                    raise RuntimeError("a stream ended without a token")
                itl = (last - first) / max(1, num_tokens - 1)
                return first - started, itl, time.perf_counter() - started, num_tokens

        began = time.perf_counter()
        done = await asyncio.gather(*(one(prompt) for prompt in prompts), return_exceptions=True)
        duration_s = time.perf_counter() - began
    good = [d for d in done if not isinstance(d, BaseException)]
    for error in (d for d in done if isinstance(d, BaseException) and not isinstance(d, openai.APIError)):
        raise error
    ttft, itl, e2e, tokens = zip(*good, strict=True)
    count = len(good)
    figures = Figures(
        num_requests=count,
        num_failed=len(done) - count,
        output_tokens=sum(tokens),
        ttft_mean_ms=statistics.mean(ttft) * 1e3,
        ttft_median_ms=statistics.median(ttft) * 1e3,
        itl_mean_ms=statistics.mean(itl) * 1e3,
        e2e_mean_ms=statistics.mean(e2e) * 1e3,
    )
    return figures, duration_s


class RouterView:
    """Means over an interval: the growth of the router's histograms between two scrapes."""

    def __init__(self, base_url: str) -> None:
        self._url = f"{base_url}/metrics"
        self._before = self._scrape()

    def take(self) -> tuple[Figures, dict[str, float]]:
        """The means, and the stages of the mean time to the first token in ms."""
        after = self._scrape()
        grown = {name: value - self._before.get(name, 0.0) for name, value in after.items()}
        self._before = after
        tbt = next(name for name in _TBT if f"{name}_count" in grown)
        failed = sum(v for k, v in grown.items() if k.startswith("baton_requests_total") and "finished" not in k)
        num_first = grown[f"{_TTFT}_count"] or 1.0
        stages = {
            name.partition("{")[2].rstrip("}"): value / num_first * 1e3
            for name, value in grown.items()
            if name.startswith("baton_ttft_stage_seconds_sum")
        }
        figures = Figures(
            num_requests=round(grown[f"{_E2E}_count"]),
            num_failed=round(failed),
            output_tokens=round(grown["baton_generated_tokens_total"]),
            ttft_mean_ms=_mean_ms(grown, _TTFT),
            ttft_median_ms=None,
            itl_mean_ms=_mean_ms(grown, tbt),
            e2e_mean_ms=_mean_ms(grown, _E2E),
        )
        return figures, stages

    def _scrape(self) -> dict[str, float]:
        text = httpx.get(self._url, timeout=10).raise_for_status().text
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if not sample.name.endswith("_bucket"):
                    # Labels that all series carry do not distinguish them.
                    labels = ",".join(v for k, v in sample.labels.items() if k not in ("cluster", "model_name"))
                    found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
        return found


def _mean_ms(grown: dict[str, float], name: str) -> float:
    count = grown[f"{name}_count"]
    return grown[f"{name}_sum"] / count * 1e3 if count else 0.0


def _run(command: list[str], log_path: Path) -> None:
    # Offline mode is set only for tools that need it: with it aiperf takes a folder for a name on the hub.
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    with log_path.open("wb") as log:
        done = subprocess.run(
            command, cwd=log_path.parent, stdout=log, stderr=log, env=environment, timeout=_TOOL_TIMEOUT_S, check=False
        )
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {log_path.read_text()[-3000:]}")


class Tap:
    """Runs the tap between the tools and the router; ``take`` returns what passed since the last call."""

    def __init__(self, base_url: str, folder: Path) -> None:
        self._path = folder / "tap.jsonl"
        self._path.touch()
        self._num_read = 0
        command = [sys.executable, "-m", "bench.tap", base_url.rpartition(":")[2], str(self._path)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.url = f"http://127.0.0.1:{int(self._process.stdout.readline())}"

    def take(self) -> dict[str, float]:
        """Means: the request's bytes, and the first byte of the request to the first event."""
        lines = self._path.read_text().splitlines()
        found = [json.loads(line) for line in lines[self._num_read :]]
        self._num_read = len(lines)
        return {
            "request ms": statistics.mean(x["request_s"] for x in found) * 1e3,
            "ttft mean ms": statistics.mean(x["first_s"] for x in found) * 1e3,
            "ttft median ms": statistics.median(x["first_s"] for x in found) * 1e3,
            "requests": len(found),
        }

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(10)
        if self._process.stdout is not None:
            self._process.stdout.close()


def _row(tool: str, side: str, figures: Figures, duration_s: float) -> dict[str, Any]:
    return {
        "tool": tool,
        "measured by": side,
        "requests": figures.num_requests,
        "failed": figures.num_failed,
        "output tokens": figures.output_tokens,
        "ttft mean ms": figures.ttft_mean_ms,
        "ttft median ms": figures.ttft_median_ms,
        "itl mean ms": figures.itl_mean_ms,
        "e2e mean ms": figures.e2e_mean_ms,
        # Both over the tool's own duration: the router does not know the start of a run.
        "tokens/s": figures.output_tokens / duration_s,
    }


async def _measure(args: argparse.Namespace, load: Load) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="baton-load-tools-") as name:
        folder = Path(name)
        options = ("--prefill", "2", "--decode", "2", *NO_PREFIX_CACHE)
        async with cluster("load-tools", options, _MODEL, folder) as running:
            tap = Tap(running.http, folder)
            url = tap.url
            tools: dict[str, Callable[[], tuple[Figures, float]]] = {
                "openai": lambda: openai_package(url, load),
                "guidellm": lambda: guidellm(args.guidellm, url, load, folder),
                "aiperf": lambda: aiperf(args.aiperf, url, load, folder),
            }
            try:
                warm_up = Load(2 * load.concurrency, load.concurrency, load.prompt_tokens, load.output_tokens)
                await asyncio.to_thread(openai_package, url, warm_up)
                tap.take()
                view = await asyncio.to_thread(RouterView, running.http)
                for tool, run in tools.items():
                    if tool != "openai" and getattr(args, tool) is None:
                        continue
                    figures, duration_s = await asyncio.to_thread(run)
                    seen, stages = await asyncio.to_thread(view.take)
                    rows += [
                        _row(tool, "tool", figures, duration_s),
                        {"tool": "", "measured by": "socket", **tap.take()},
                        _row("", "router", seen, duration_s) | {"samples stages ms": stages},
                    ]
            finally:
                tap.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.load_tools", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--guidellm", type=Path, help="the guidellm command; left out without")
    parser.add_argument("--aiperf", type=Path, help="the aiperf command; left out without")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    args = parser.parse_args()
    # Treated as Ctrl-C: the context manager ends the cluster.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    started = datetime.now(UTC)
    load = Load(args.requests, args.concurrency, args.prompt_tokens, args.output_tokens)
    rows = asyncio.run(_measure(args, load))
    result = {
        "load": f"{load.num_requests} requests, {load.concurrency} at a time, {load.prompt_tokens} + "
        f"{load.output_tokens} tokens, demo model, 2 prefill + 2 decode",
        "runs": rows,
    }
    show(Console(width=160), "load tools", result)
    record = {
        "date": started.isoformat(timespec="seconds"),
        "commit": measure.commit(),
        "machine": measure.machine(),
        "versions": machine.versions(),
        "results": {"load_tools": result},
    }
    path = args.out / f"load-tools-{started.strftime('%Y-%m-%dT%H%M%SZ')}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"saved {path}")


if __name__ == "__main__":
    main()
