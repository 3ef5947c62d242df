"""What stands beside ours on a GPU is called as often as it is timed, and stays the same step."""

from __future__ import annotations

import pytest
import torch

from bench.gpu_measure import Device
from bench.gpu_model import _Transformers, model_config, transformers_peers
from bench.gpu_sizes import TINY

SIZES = TINY[0]


@pytest.mark.parametrize("context", [1, 40])
def test_a_step_of_transformers_is_the_same_step_whenever_it_is_taken(context: int) -> None:
    """A static cache counts its tokens itself: once, the second step went past its end."""
    rows = 2
    with torch.inference_mode():
        held = _Transformers(SIZES, model_config(SIZES, 64), Device(), rows, context)
        eager = [held.eager() for _ in range(3)]
        static = [held.static() for _ in range(3)]
    assert eager[0].shape == (rows, 1, SIZES.vocabulary)
    for again in (*eager[1:], *static[1:]):
        torch.testing.assert_close(again, eager[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(static[0], eager[0], rtol=1e-4, atol=1e-5)


def test_peers_say_what_memory_they_need() -> None:
    config = model_config(SIZES, 64)
    small, large = (transformers_peers(SIZES, config, Device(), rows, 40)["static"].needs_bytes for rows in (1, 64))
    token_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * SIZES.dtype.itemsize
    assert large - small > 63 * 40 * token_bytes
