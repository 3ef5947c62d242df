"""Reports to transfers, layer by layer, which blocks of a sequence are final while it is computed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Protocol


class LayerSink(Protocol):
    """Is told which blocks are final. Must not block or raise, also after an abort."""

    def layer_ready(self, layer: int, num_blocks: int) -> None:
        """The first ``num_blocks`` blocks have their last bytes in this layer."""


# (sequence id, its leading blocks that are final)
Final = tuple[str, int]


class _Watched:
    __slots__ = ("num_final", "sink", "told")

    def __init__(self, num_layers: int, num_final: int) -> None:
        self.sink: LayerSink | None = None
        # In all layers, steps under way left out.
        self.num_final = num_final
        # By layer: what the sink was told.
        self.told = [0] * num_layers


class LayerProgress:
    """Every (layer, count) is told once, by rising count; a sink that is attached late is told what it missed.

    Layers of a step under way are told by the engine thread alone, in ``layer_queued``: on a GPU the layer's work is
    then queued on that thread's stream, and the sink waits for the stream. A sink that is attached during a step is
    told of the rest of that step by ``step_done``, when no wait is needed.
    """

    def __init__(self, num_layers: int, on_error: Callable[[str, Exception], object]) -> None:
        """``on_error(sequence_id, error)``: a sink raised in the engine thread; it is told no more."""
        self._num_layers = num_layers
        self._on_error = on_error
        # Sinks are attached on the event loop and told in the engine thread.
        self._lock = threading.Lock()
        self._watched: dict[str, _Watched] = {}

    def watch(self, sequence_id: str, num_final: int = 0) -> None:
        """A sink may be attached to the sequence from now on. To be called before it is computed, or while it is.

        ``num_final``: its leading blocks that are final.
        """
        with self._lock:
            self._watched[sequence_id] = _Watched(self._num_layers, num_final)

    def forget(self, sequence_id: str) -> None:
        with self._lock:
            self._watched.pop(sequence_id, None)

    @property
    def is_watching(self) -> bool:
        return bool(self._watched)

    def is_watched(self, sequence_id: str) -> bool:
        return sequence_id in self._watched

    def attach(self, sequence_id: str, sink: LayerSink) -> None:
        """Ignored for a sequence that is not watched. Raises what the sink raises, which is then told no more."""
        with self._lock:
            watched = self._watched.get(sequence_id)
            if watched is not None:
                watched.sink = sink
                self._tell_all(watched)

    def layer_queued(self, layer: int, finals: Iterable[Final]) -> None:
        """In the engine thread: what is final in this layer once the step that is being launched is computed."""
        self._each(finals, lambda watched, num_blocks: _tell(watched, layer, num_blocks))

    def step_done(self, finals: Iterable[Final]) -> None:
        """What is final in all layers now that a step is computed."""

        def done(watched: _Watched, num_blocks: int) -> None:
            watched.num_final = max(watched.num_final, num_blocks)
            self._tell_all(watched)

        self._each(finals, done)

    def _each(self, finals: Iterable[Final], tell: Callable[[_Watched, int], None]) -> None:
        for sequence_id, num_blocks in finals:
            try:
                with self._lock:
                    watched = self._watched.get(sequence_id)
                    if watched is not None:
                        tell(watched, num_blocks)
            except Exception as error:
                # Its push lacks a layer, so its commit fails that sequence alone.
                self._on_error(sequence_id, error)

    def _tell_all(self, watched: _Watched) -> None:
        for layer in range(self._num_layers):
            _tell(watched, layer, watched.num_final)


def _tell(watched: _Watched, layer: int, num_blocks: int) -> None:
    if watched.sink is None or num_blocks <= watched.told[layer]:
        return
    watched.told[layer] = num_blocks
    # Only a sink that does not raise is told more.
    sink, watched.sink = watched.sink, None
    sink.layer_ready(layer, num_blocks)
    watched.sink = sink
