"""Driver of transformers' ``generate`` with its own growing cache and default attention (SDPA)."""

from __future__ import annotations

import time
from importlib import import_module
from typing import Any

from bench.peers.drivers.protocol import Start, serve


class Transformers:
    def __init__(self, start: Start) -> None:
        self._torch: Any = import_module("torch")
        self._transformers: Any = import_module("transformers")
        self._torch.set_num_threads(start.num_threads)
        self._model: Any = self._transformers.AutoModelForCausalLM.from_pretrained(
            start.model, dtype=self._torch.bfloat16
        )
        self._ids: Any = None
        self._cache: Any = None
        self.settings = {"dtype": "bfloat16", "attention": "sdpa", "cache": "dynamic", "threads": start.num_threads}

    def prefill(self, prompt: list[int]) -> tuple[float, int]:
        ids = self._torch.tensor([prompt])
        with self._torch.inference_mode():
            started = time.perf_counter()
            token = self._model(input_ids=ids, use_cache=True, logits_to_keep=1).logits[0, -1].argmax()
            return time.perf_counter() - started, int(token)

    def fill(self, prompts: list[list[int]]) -> None:
        self._ids = self._torch.tensor(prompts)
        self._cache = self._transformers.DynamicCache(config=self._model.config)
        with self._torch.inference_mode():
            # All but the last token: ``generate`` starts with one token that is not in the cache.
            self._model(input_ids=self._ids[:, :-1], past_key_values=self._cache, use_cache=True, logits_to_keep=1)

    def decode(self, num_steps: int) -> tuple[float, int]:
        """Timed from the first token to the last, without the preparation of ``generate``."""
        batch = len(self._ids)
        never = self._torch.zeros(batch, dtype=self._torch.bool)
        stamps: list[float] = []

        def stamp(ids: Any, scores: Any, **kwargs: Any) -> Any:
            stamps.append(time.perf_counter())
            return never

        self._ids = self._model.generate(
            self._ids,
            attention_mask=self._torch.ones_like(self._ids),
            past_key_values=self._cache,
            do_sample=False,
            min_new_tokens=num_steps + 1,
            max_new_tokens=num_steps + 1,
            stopping_criteria=[stamp],
        )
        return stamps[-1] - stamps[0], batch * (len(stamps) - 1)

    def clear(self) -> None:
        self._ids = self._cache = None


if __name__ == "__main__":
    serve(Transformers, ("transformers", "torch"))
