"""What work costs in seconds, learned from what nodes report: computing a prompt token, moving a byte of KV, and having
KV beside which tokens are generated. Pure.

Each is the slope of a line through what was seen, the newest counting most, as every step, prompt and transfer also has
a part that does not depend on its size. Until something was seen, and where sizes say nothing yet, a setting counts.
"""

from __future__ import annotations

from router.cluster.config import PolicyConfig

# Sightings that count: each new one takes so much from those before.
_KEPT = 0.98
# A node's own rate counts after so many; until then that of all nodes.
_MIN_SEEN = 8
# Noise can make a slope zero or less, but work is never free.
_LEAST_SHARE = 0.01


class Line:
    """Seconds by size. The line starts near zero: one sighting says that nothing costs nothing."""

    __slots__ = ("_least", "_slope", "_sums", "num_seen")

    def __init__(self, default: float) -> None:
        self._slope = default
        self._least = default * _LEAST_SHARE
        self.num_seen = 0
        # By weight: sightings, sizes, seconds, sizes squared, sizes times seconds.
        self._sums = [0.0] * 5

    @property
    def slope(self) -> float:
        """Seconds for each further unit of size."""
        return self._slope

    def see(self, size: float, seconds: float) -> None:
        seen = (1.0, size, seconds, size * size, size * seconds)
        self._sums = [before * _KEPT + new for before, new in zip(self._sums, seen, strict=True)]
        count, sizes, times, squares, products = self._sums
        self.num_seen += 1
        spread = (count + 1.0) * squares - sizes * sizes
        if spread > 0:
            self._slope = max(self._least, ((count + 1.0) * products - sizes * times) / spread)


class Rates:
    """Seconds for each unit of work, of a node if it is known and else of all."""

    def __init__(self, config: PolicyConfig) -> None:
        self._config = config
        self._prompt = Line(config.prompt_token_s)
        self._kv = Line(config.kv_token_s)
        self._move = Line(config.move_byte_s)
        self._prompt_of: dict[str, Line] = {}
        self._kv_of: dict[str, Line] = {}
        self._num_output_tokens = float(config.output_tokens)

    def prompt_token_s(self, node_id: str) -> float:
        """Computing one more token of a prompt."""
        return _slope(self._prompt_of.get(node_id), self._prompt)

    def kv_token_s(self, node_id: str) -> float:
        """What one more token in the running sequences adds to each step, thus to each token generated there."""
        return _slope(self._kv_of.get(node_id), self._kv)

    @property
    def move_byte_s(self) -> float:
        """What one more byte to be moved adds between the end of the prompt and the second token."""
        return self._move.slope

    @property
    def num_output_tokens(self) -> float:
        """That a sequence will generate."""
        return self._num_output_tokens

    def computed(self, node_id: str, num_tokens: int, seconds: float) -> None:
        """A prompt's part that was not there."""
        self._see(self._prompt_of, self._prompt, self._config.prompt_token_s, node_id, num_tokens, seconds)

    def moved(self, num_bytes: int, exposed_s: float) -> None:
        if num_bytes > 0:
            self._move.see(num_bytes, exposed_s)

    def generated(self, node_id: str, num_tokens: int, token_s: float, num_beside: int) -> None:
        """A sequence has ended: its tokens, the time between two of them, and the tokens that ran beside it."""
        self._num_output_tokens += (num_tokens - self._num_output_tokens) * (1 - _KEPT)
        if token_s > 0:
            self._see(self._kv_of, self._kv, self._config.kv_token_s, node_id, num_beside, token_s)

    def forget(self, node_id: str) -> None:
        self._prompt_of.pop(node_id, None)
        self._kv_of.pop(node_id, None)

    @staticmethod
    def _see(of: dict[str, Line], every: Line, default: float, node_id: str, size: float, seconds: float) -> None:
        if size > 0:
            every.see(size, seconds)
            of.setdefault(node_id, Line(default)).see(size, seconds)


def _slope(own: Line | None, every: Line) -> float:
    return own.slope if own is not None and own.num_seen >= _MIN_SEEN else every.slope
