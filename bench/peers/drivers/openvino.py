"""Driver of OpenVINO GenAI's continuous batching, step by step; the model was exported by optimum-intel."""

from __future__ import annotations

import time
from importlib import import_module
from typing import Any

from bench.peers.drivers.protocol import MAX_BATCH_TOKENS, MAX_MODEL_TOKENS, MAX_SEQUENCES, Start, serve

_KV_BYTES_PER_TOKEN = 16 * 1024


class OpenVino:
    def __init__(self, start: Start) -> None:
        self._genai: Any = import_module("openvino_genai")
        self._numpy: Any = import_module("numpy")
        self._tensor: Any = import_module("openvino").Tensor
        scheduler = self._genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = MAX_BATCH_TOKENS
        scheduler.max_num_seqs = MAX_SEQUENCES
        scheduler.enable_prefix_caching = False
        scheduler.cache_size = -(-start.kv_tokens * _KV_BYTES_PER_TOKEN // 2**30)
        # Keys and values have 8 bits by default: set to the width that all other engines use here.
        properties = {
            "INFERENCE_PRECISION_HINT": "bf16",
            "KV_CACHE_PRECISION": "bf16",
            "INFERENCE_NUM_THREADS": start.num_threads,
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": True,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        }
        self._pipeline: Any = self._genai.ContinuousBatchingPipeline(start.converted, scheduler, "CPU", properties)
        self._num_added = 0
        self._live: list[Any] = []
        self.settings = properties | {
            "max_num_batched_tokens": MAX_BATCH_TOKENS,
            "enable_prefix_caching": False,
            "cache_size_gib": scheduler.cache_size,
        }

    def _add(self, prompt: list[int], max_tokens: int) -> Any:
        config = self._genai.GenerationConfig()
        config.max_new_tokens = max_tokens
        config.ignore_eos = True
        config.do_sample = False
        self._num_added += 1
        ids = self._tensor(self._numpy.array([prompt], dtype=self._numpy.int64))
        return self._pipeline.add_request(self._num_added, ids, config)

    def prefill(self, prompt: list[int]) -> tuple[float, int]:
        started = time.perf_counter()
        handle = self._add(prompt, 1)
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        taken = time.perf_counter() - started
        return taken, int(handle.read_all()[0].generated_ids[0])

    def fill(self, prompts: list[list[int]]) -> None:
        self._live = [self._add(prompt, MAX_MODEL_TOKENS - len(prompt)) for prompt in prompts]
        waiting = list(self._live)
        while waiting:
            self._pipeline.step()
            waiting = [handle for handle in waiting if not self._read(handle)]
        # The first sequences have generated tokens while the others were computed.
        for handle in self._live:
            self._read(handle)

    def decode(self, num_steps: int) -> tuple[float, int]:
        started = time.perf_counter()
        for _ in range(num_steps):
            self._pipeline.step()
        taken = time.perf_counter() - started
        return taken, sum(self._read(handle) for handle in self._live)

    def _read(self, handle: Any) -> int:
        """The number of tokens since the last call."""
        count = 0
        while handle.can_read():
            count += sum(len(output.generated_ids) for output in handle.read().values())
        return count

    def clear(self) -> None:
        for handle in self._live:
            handle.cancel()
        # Cancelled requests are removed in the next step.
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        self._live = []


if __name__ == "__main__":
    serve(OpenVino, ("openvino", "openvino-genai", "optimum-intel"))
