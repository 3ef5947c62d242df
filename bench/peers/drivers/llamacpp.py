"""Driver of llama.cpp through its C interface: batches of tokens with their sequences and positions, greedy sampler."""

from __future__ import annotations

import time
from importlib import import_module
from typing import Any

from bench.peers.drivers.gguf_converter import NAME
from bench.peers.drivers.protocol import MAX_BATCH_TOKENS, Start, serve

_MAX_LIVE = 32
# One more than the live sequences, for prompts.
_PROMPT_SEQUENCE = _MAX_LIVE
# A prompt of 2,048 tokens, or of 512 and the tokens generated after it.
_CELLS = 2304
# The default; larger values were not faster here.
_MICRO_BATCH_TOKENS = 512


class LlamaCpp:
    def __init__(self, start: Start) -> None:
        self._c: Any = import_module("llama_cpp")
        self._c.llama_backend_init()
        parameters = self._c.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self._model = self._c.llama_model_load_from_file(f"{start.converted}/{NAME}".encode(), parameters)
        if not self._model:
            raise RuntimeError("llama.cpp does not load the file; its log says why")
        context = self._c.llama_context_default_params()
        # A cell pool for each sequence: in a common pool each sequence also attends, masked, to the cells of the
        # others.
        context.kv_unified = False
        context.n_ctx = (_MAX_LIVE + 1) * _CELLS
        context.n_batch = MAX_BATCH_TOKENS
        context.n_ubatch = _MICRO_BATCH_TOKENS
        context.n_seq_max = _MAX_LIVE + 1
        context.n_threads = context.n_threads_batch = start.num_threads
        self._context = self._c.llama_init_from_model(self._model, context)
        if not self._context:
            raise RuntimeError("llama.cpp makes no context; its log says why")
        self._memory = self._c.llama_get_memory(self._context)
        self._sampler = self._c.llama_sampler_init_greedy()
        self._batch = self._c.llama_batch_init(MAX_BATCH_TOKENS, 0, 1)
        self._num_filled = 0
        # For each live sequence: the newest token and its position.
        self._newest: list[tuple[int, int]] = []
        self.settings = {
            "weights": "bf16",
            "keys and values": "f16",
            "flash_attn": "auto",
            "kv_unified": False,
            "n_batch": MAX_BATCH_TOKENS,
            "n_ubatch": _MICRO_BATCH_TOKENS,
            "threads": start.num_threads,
            "system": self._c.llama_print_system_info().decode(),
        }

    def _put(self, token: int, position: int, sequence: int, is_sampled: bool) -> int:
        """Adds a token to the batch; returns its index."""
        i, batch = self._num_filled, self._batch
        batch.token[i], batch.pos[i] = token, position
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        batch.logits[i] = is_sampled
        self._num_filled += 1
        return i

    def _compute(self) -> None:
        self._batch.n_tokens, self._num_filled = self._num_filled, 0
        code = self._c.llama_decode(self._context, self._batch)
        if code:
            raise RuntimeError(f"llama_decode says {code}")

    def _first_token(self, prompt: list[int], sequence: int) -> int:
        for begin in range(0, len(prompt), MAX_BATCH_TOKENS):
            part = prompt[begin : begin + MAX_BATCH_TOKENS]
            for i, token in enumerate(part, begin):
                place = self._put(token, i, sequence, i == len(prompt) - 1)
            self._compute()
        return int(self._c.llama_sampler_sample(self._sampler, self._context, place))

    def prefill(self, prompt: list[int]) -> tuple[float, int]:
        started = time.perf_counter()
        token = self._first_token(prompt, _PROMPT_SEQUENCE)
        taken = time.perf_counter() - started
        self._c.llama_memory_seq_rm(self._memory, _PROMPT_SEQUENCE, -1, -1)
        return taken, token

    def fill(self, prompts: list[list[int]]) -> None:
        self._newest = [(self._first_token(prompt, i), len(prompt)) for i, prompt in enumerate(prompts)]

    def decode(self, num_steps: int) -> tuple[float, int]:
        started = time.perf_counter()
        for _ in range(num_steps):
            places = [self._put(*newest, i, True) for i, newest in enumerate(self._newest)]
            self._compute()
            self._newest = [
                (int(self._c.llama_sampler_sample(self._sampler, self._context, place)), position + 1)
                for place, (_, position) in zip(places, self._newest, strict=True)
            ]
        return time.perf_counter() - started, num_steps * len(self._newest)

    def clear(self) -> None:
        self._c.llama_memory_clear(self._memory, False)
        self._newest = []


if __name__ == "__main__":
    serve(LlamaCpp, ("llama-cpp-python",))
