"""A router to which all nodes are equally fast, for a bench that shows what their measured speeds are good for.

    python -m bench.speedless router OPTIONS

Runs the same program as `python -m cli`. What the nodes tell of their steps, and what was seen of their prompts and
tokens, counts for all nodes together.
"""

from __future__ import annotations

import runpy

from baton.types import StepTimes
from router.cluster.rates import Rates

# What the rates know of every node.
_EVERY = "every node"
_of_node = {name: getattr(Rates, name) for name in ("step_times", "computed", "generated")}
_mean: list[StepTimes] = []
_KEPT = 0.98


def _step_times(rates: Rates, node_id: str, told: StepTimes | None) -> StepTimes:
    if told is not None:
        before = _mean[-1] if _mean else told
        _mean[:] = [
            StepTimes(
                *(
                    _KEPT * getattr(before, name) + (1 - _KEPT) * getattr(told, name)
                    for name in ("base_s", "prompt_token_s", "sequence_s", "kv_token_s")
                )
            )
        ]
    found: StepTimes = _of_node["step_times"](rates, _EVERY, _mean[-1] if _mean else None)
    return found


def _computed(rates: Rates, node_id: str, num_tokens: int, seconds: float) -> None:
    _of_node["computed"](rates, _EVERY, num_tokens, seconds)


def _generated(rates: Rates, node_id: str, num_tokens: int, token_s: float, num_beside: int) -> None:
    _of_node["generated"](rates, _EVERY, num_tokens, token_s, num_beside)


def main() -> None:
    for name, method in (("step_times", _step_times), ("computed", _computed), ("generated", _generated)):
        setattr(Rates, name, method)
    # The program that `python -m cli` runs; benches do not import it.
    runpy.run_module("cli", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
