"""What work costs in seconds, learned from what nodes report: computing a prompt token, moving a byte of KV, and
generating a token beside others. Pure.

A node that measures its steps tells them. Until it does, its rates are slopes of lines through what was seen of its
requests, the newest counting most, as every step, prompt and transfer also has a part that does not depend on its size.
Where nothing was seen, what is known of other nodes counts, and at first a setting.
"""

from __future__ import annotations

from baton.types import StepTimes
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


class _Mean:
    """Of what nodes tell; the newest count most."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def see(self, value: float) -> None:
        if value > 0:
            self.value += (value - self.value) * (1 - _KEPT) if self.value else value


class Rates:
    """Seconds for each unit of work, of a node if it is known and else of all."""

    def __init__(self, config: PolicyConfig) -> None:
        self.config = config
        # Of the nodes that tell their step times; the base of those that decode.
        self._told_base, self._told_prompt, self._told_sequence, self._told_kv = (_Mean() for _ in range(4))
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

    def step_times(self, node_id: str, told: StepTimes | None) -> StepTimes:
        """Of a node's steps. A node does not know what it has not done: for that, others' times count."""
        base_s = prompt_token_s = sequence_s = kv_token_s = 0.0
        if told is not None:
            base_s, prompt_token_s = told.base_s, told.prompt_token_s
            sequence_s, kv_token_s = told.sequence_s, told.kv_token_s
        has_decoded = sequence_s > 0 or kv_token_s > 0
        self._told_prompt.see(prompt_token_s)
        if has_decoded:
            self._told_base.see(base_s)
            self._told_sequence.see(sequence_s)
            self._told_kv.see(kv_token_s)
        else:
            base_s = max(base_s, self._told_base.value)
        return StepTimes(
            base_s,
            prompt_token_s or self._guess(self._prompt_of.get(node_id), self._told_prompt, self._prompt),
            sequence_s or self._told_sequence.value,
            kv_token_s or self._guess(self._kv_of.get(node_id), self._told_kv, self._kv),
        )

    def has_seen(self, node_id: str) -> bool:
        """Prompts of this node, often enough for a rate of its own."""
        own = self._prompt_of.get(node_id)
        return own is not None and own.num_seen >= _MIN_SEEN

    @staticmethod
    def _guess(own: Line | None, told: _Mean, every: Line) -> float:
        """Of a node that has not told it: what was seen there, then what others tell, then what was seen of others."""
        return own.slope if own is not None and own.num_seen >= _MIN_SEEN else told.value or every.slope

    def computed(self, node_id: str, num_tokens: int, seconds: float) -> None:
        """A prompt's part that was not there."""
        self._see(self._prompt_of, self._prompt, self.config.prompt_token_s, node_id, num_tokens, seconds)

    def moved(self, num_bytes: int, exposed_s: float) -> None:
        if num_bytes > 0:
            self._move.see(num_bytes, exposed_s)

    def generated(self, node_id: str, num_tokens: int, token_s: float, num_beside: int) -> None:
        """A sequence has ended: its tokens, the time between two of them, and the tokens that ran beside it."""
        self._num_output_tokens += (num_tokens - self._num_output_tokens) * (1 - _KEPT)
        if token_s > 0:
            self._see(self._kv_of, self._kv, self.config.kv_token_s, node_id, num_beside, token_s)

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
