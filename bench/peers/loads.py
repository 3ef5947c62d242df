"""The loads that every server gets: closed loops, which keep a number of streams busy, and an open loop, which sends at
a rate, whatever the answers do."""

from __future__ import annotations

from loadgen.load import Load, closed, poisson, same_size

_LIMIT_S = 180.0
_OUTPUT_TOKENS = 64


def _closed(streams: int, prompt_tokens: int, count: int) -> Load:
    plural = "s" if streams > 1 else ""
    requests = same_size(count, prompt_tokens, _OUTPUT_TOKENS)
    return closed(f"{streams} stream{plural} {prompt_tokens} in", requests, streams, _LIMIT_S)


def _open(rate: float, prompt_tokens: int, count: int) -> Load:
    name = f"open loop {rate:g}/s {prompt_tokens} in"
    return poisson(name, same_size(count, prompt_tokens, _OUTPUT_TOKENS), rate, _LIMIT_S, "0")


LOADS: tuple[Load, ...] = (_closed(1, 1024, 2), _closed(8, 512, 16), _closed(32, 512, 48), _open(0.45, 1024, 10))
QUICK_LOADS: tuple[Load, ...] = (_closed(1, 1024, 1), _closed(8, 512, 8))
