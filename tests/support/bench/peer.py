"""An engine without a model for tests of ``bench peers``. Arguments: Start as JSON, a fault, a number.

The fault comes at the call of that number: raise, exit, hang, short (a token is missing), noise (prints, all along).
"""

import os
import sys
import threading
import time

from bench.peers.drivers.protocol import Start, serve


class FakeEngine:
    def __init__(self, start: Start) -> None:
        self.settings = {"threads": start.num_threads}
        self._fault, self._at = sys.argv[2], int(sys.argv[3])
        self._num_calls = 0
        self._batch = 0
        if self._fault == "spin":
            threading.Thread(target=_spin, daemon=True).start()

    def _called(self) -> bool:
        self._num_calls += 1
        if self._fault == "noise":
            sys.stdout.write("not an answer\n")
        if self._num_calls != self._at:
            return False
        if self._fault == "raise":
            raise RuntimeError("planted")
        if self._fault == "exit":
            sys.stderr.write("last words\n")
            sys.stderr.flush()
            os._exit(3)
        if self._fault == "hang":
            time.sleep(600)
        return self._fault == "short"

    def prefill(self, prompt: list[int]) -> tuple[float, int]:
        self._called()
        return len(prompt) / 1000, prompt[0]

    def fill(self, prompts: list[list[int]]) -> None:
        self._called()
        self._batch = len(prompts)

    def decode(self, num_steps: int) -> tuple[float, int]:
        is_short = self._called()
        return num_steps * 0.01, num_steps * self._batch - is_short

    def clear(self) -> None:
        self._batch = 0


def _spin() -> None:
    while True:
        pass


if __name__ == "__main__":
    serve(FakeEngine, ())
