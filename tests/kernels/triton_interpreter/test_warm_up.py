"""No kernel is compiled in a step that is served: what Triton would compile is counted by what it would specialize for.

The interpreter compiles nothing, but launches what would be compiled, with the arguments that decide about it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from torch import Tensor

from engine.config import EngineConfig
from engine.kernels.triton import decode_attention, gemm, pointwise, prefill_attention, sampling, shared_prefix
from engine.runner import Runner
from engine.scheduler_config import SchedulerConfig
from tests.support.engine_driver import Driver, random_prompt, spec
from tests.support.models import ORACLE_CASES, VOCAB_SIZE

MODULES = (decode_attention, gemm, pointwise, prefill_attention, sampling, shared_prefix)


def specialized(name: str, value: object, is_free: bool) -> object:
    """What Triton's launcher looks at of one argument."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if hasattr(value, "block_shape"):
        return tuple(value.block_shape)
    if (name.isupper() and len(name) > 1) or isinstance(value, bool | None):
        return value
    if isinstance(value, int):
        width = "i32" if -(2**31) <= value < 2**31 else "i64"
        return width if is_free else (width, value == 1, value % 16 == 0)
    return type(value)


@contextmanager
def counting() -> Iterator[set[object]]:
    """Distinct binaries that launches within would need."""
    found: set[object] = set()

    def hook(kernel: object, *args: object, **options: object) -> None:
        names = kernel.arg_names  # type: ignore[attr-defined]
        free = set(kernel.kwargs["do_not_specialize"] or ())  # type: ignore[attr-defined]
        values = {**dict(zip(names, args, strict=False)), **options}
        assert set(values) == set(names)
        found.add((kernel.__name__, *(specialized(n, values[n], n in free) for n in names)))  # type: ignore[attr-defined]

    kernels = [value for m in MODULES for name, value in vars(m).items() if name.endswith("_kernel")]
    for kernel in kernels:
        kernel.add_pre_run_hook(partial(hook, kernel))
    try:
        yield found
    finally:
        for kernel in kernels:
            kernel.pre_run_hooks.pop()


@pytest.mark.parametrize("name", ["llama-gqa2-d32", "mistral-window-40"])
def test_serving_launches_nothing_that_was_not_launched_before(tmp_path: Path, name: str) -> None:
    case = next(c for c in ORACLE_CASES if c.name == name)
    config = EngineConfig(
        dtype="float16", num_blocks=80, block_tokens=16, kernels="triton", max_graph_seqs=2,
        scheduler=SchedulerConfig(max_batch_tokens=150, max_num_seqs=40),
    )  # fmt: skip
    with counting() as started:
        runner = Runner.load(case.save(tmp_path / "model"), config)
        few = set(started)
        runner.warm_up(config, is_whole=True)
    # The rest of the tiles: of products of other numbers of rows, of rows with parts to combine.
    assert len(started) > len(few)
    rng, driver = random.Random(0), Driver(runner)
    with counting() as served:
        for num_seqs in (1, 3, 18, 40):
            lengths = [rng.choice((1, 2, 16, 17)) for _ in range(num_seqs)]
            options: dict[str, object] = {"temperature": 1.0, "top_p": 0.9, "top_k": 5}
            sequences = [
                driver.add(spec(f"{num_seqs}-{i}", random_prompt(n, VOCAB_SIZE), **(options if i == 1 else {})))
                for i, n in enumerate(lengths)
            ]
            for chunk in (rng.choice((1, 16)), 1000, 1):
                driver.step([driver.piece(s, chunk) for s in sequences])
            for s in sequences:
                driver.remove(s)
        # Beyond a split, in chunks, then decoding beside a prompt.
        long = driver.add(spec("long", random_prompt(270, VOCAB_SIZE)))
        for chunk in (129, 128, 1000, 1):
            driver.step([driver.piece(long, chunk)])
        driver.step([driver.piece(long, 1), driver.piece(driver.add(spec("beside", (1, 2, 3))), 3)])
    assert served <= started, sorted(map(str, served - started))
