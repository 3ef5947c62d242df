"""What this machine's processors have worked."""

from __future__ import annotations

import os

import pytest

from loadgen.machine import processor_s


def test_processors_have_worked_but_for_their_idle_time() -> None:
    # user nice system idle iowait irq softirq steal guest guest_nice; guests are in user and nice already.
    ticks = (1000, 20, 300, 99_999, 88_888, 4, 5, 6, 500, 10)
    text = f"cpu  {' '.join(map(str, ticks))}\ncpu0 1 1 1 1 1 1 1 1 1 1\n"
    assert processor_s(text) == pytest.approx((1000 + 20 + 300 + 4 + 5 + 6) / os.sysconf("SC_CLK_TCK"))
    # An older kernel's, and none at all.
    assert processor_s("cpu 1 2 3 4\n") is None
    assert processor_s("") is None
    now_s = processor_s()
    assert now_s is not None
    assert now_s > 0
