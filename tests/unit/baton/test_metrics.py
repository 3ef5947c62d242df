"""Counting: what children hold, what Prometheus reads, what steps cost, where energy comes from, the port."""

import asyncio
import math
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from baton.errors import BadConfig
from baton.metrics import OTHER, Counters, Histogram, Metrics, exposition
from baton.metrics_server import MetricsServer, MetricsServerConfig
from baton.timeline import Timeline
from baton.types import Failure, SamplingParams, SequenceSpec
from engine.cost import CostModel
from engine.events import Failed
from engine.meter import EngineMeter, StepBook, TakenStep
from engine.model_config import ModelConfig, RopeConfig
from engine.step import Piece, Sequence, StepPlan, StepShape
from worker import energy


def read(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(exposition(metrics).decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for f in families for s in f.samples}


def test_a_histogram_counts_what_is_at_a_bound_below_it() -> None:
    metrics = Metrics({"node": "n0"})
    found = metrics.histogram("baton_x_seconds", "x", (0.1, 1.0))
    for value in (0.05, 0.1, 0.5, 1.0, 7.0):
        found.observe(value)
    found.observe(0.5, 3)
    text = read(metrics)
    buckets = [text[("baton_x_seconds_bucket", (("le", le), ("node", "n0")))] for le in ("0.1", "1.0", "+Inf")]
    assert buckets == [2, 7, 8]
    assert text[("baton_x_seconds_count", (("node", "n0"),))] == 8
    assert text[("baton_x_seconds_sum", (("node", "n0"),))] == pytest.approx(10.15)


def test_bounds_must_rise() -> None:
    with pytest.raises(BadConfig):
        Histogram((1.0, 0.5))


def test_labels_from_outside_are_bounded() -> None:
    counted = Counters(1, max_children=3)
    for i in range(100):
        counted.add(f"code {i}")
    assert len(counted.children) == 4
    assert counted.children[(OTHER,)].value == 97


def test_a_gauge_that_is_not_known_is_not_shown() -> None:
    metrics = Metrics()
    metrics.gauge("baton_a", "a", lambda: None)
    metrics.gauge("baton_b", "b", lambda: 2.0, kind="x")
    assert read(metrics) == {("baton_b", (("kind", "x"),)): 2.0}


# -- steps


def model_config(windows: tuple[int | None, ...]) -> ModelConfig:
    return ModelConfig(
        architecture="x", vocab_size=100, hidden_size=16, intermediate_size=24, num_layers=len(windows), num_heads=4,
        num_kv_heads=2, head_dim=4, rms_norm_eps=1e-5, rope=RopeConfig(), qkv_bias=False, output_bias=False,
        mlp_bias=False, qk_norm=False, tied_embeddings=False, windows=windows, max_model_tokens=512, dtype="float32",
    )  # fmt: skip


def sequence(num_prompt: int) -> Sequence:
    return Sequence(SequenceSpec("s", tuple(range(num_prompt)), SamplingParams(max_tokens=9, seed=0)))


@pytest.mark.parametrize("windows", [(None, None), (7, None), (7, 7), (1, 300)])
@pytest.mark.parametrize(("start", "count"), [(0, 1), (0, 20), (5, 4), (3, 30), (40, 1), (40, 9)])
def test_cost_of_attention_is_what_counting_one_by_one_gives(
    windows: tuple[int | None, ...], start: int, count: int
) -> None:
    cost = CostModel.of(model_config(windows), "float32", "none")
    plan = StepPlan((Piece(sequence(60), start, count, samples=True),))
    seen = [[range(max(0, p + 1 - (w or 999)), p + 1) for p in range(start, start + count)] for w in windows]
    pairs = sum(len(keys) for layer in seen for keys in layer)
    reads = sum(len({k for keys in layer for k in keys}) for layer in seen)
    layer = 16 * (16 + 2 * 8) + 16 * 16 + 3 * 16 * 24
    flops, num_bytes = cost.step(plan)
    assert flops == 2 * layer * 2 * count + 2 * 16 * 100 + 4 * 16 * pairs
    assert num_bytes == 4 * (layer * 2 + 16 * 100) + 4 * 2 * 8 * (reads + 2 * count)


def test_steps_are_counted_by_what_is_in_them() -> None:
    metrics, timeline = Metrics(), Timeline()
    book = StepBook(timeline, EngineMeter(metrics))
    prompt, decoding = sequence(40), sequence(8)
    decoding.token_ids.append(5)
    first = Piece(prompt, 0, 32, samples=False)
    last = Piece(decoding, 8, 1, samples=True)
    shape = StepShape(32, 496, 1, 9)
    for pieces, seconds, has_failed in (
        ((first,), 0.5, False), ((last,), 0.01, False), ((first, last), 0.6, False), ((last,), 0.01, True),
    ):  # fmt: skip
        book.add(TakenStep(StepPlan(pieces, shape), has_failed, 1.0, 1.0 + seconds, seconds / 2))
    assert len(timeline.since(0.0).steps) == 3, "a short step waits for others"
    book.settle()
    assert [step[2:5] for step in timeline.since(0.0).steps] == [
        (32, 0, ("s",)), (0, 1, ()), (32, 1, ("s",)), (0, 1, ()),
    ]  # fmt: skip
    # What costs time beside the numbers of tokens, and how long streams waited.
    assert [step[5:] for step in timeline.since(0.0).steps[:2]] == [(496, 9, 0.25), (496, 9, 0.005)]
    text = read(metrics)
    counts = {p: text[("baton_step_seconds_count", (("phase", p),))] for p in ("prefill", "decode", "mixed")}
    assert counts == {"prefill": 1, "decode": 1, "mixed": 1}
    assert text[("baton_step_failures_total", (("phase", "decode"),))] == 1
    assert text[("baton_computed_tokens_total", (("phase", "prefill"),))] == 64
    assert text[("baton_computed_tokens_total", (("phase", "decode"),))] == 2


def test_sequences_without_finite_logits_are_counted_and_other_failures_are_not() -> None:
    metrics = Metrics()
    codes = ("BadLogits", "InternalError", "BadLogits")
    EngineMeter(metrics).outcome([Failed("s", Failure(code, "", False)) for code in codes])
    assert read(metrics)[("baton_bad_logits_total", ())] == 2


def test_steps_wait_for_no_more_than_so_many_others() -> None:
    timeline = Timeline()
    book = StepBook(timeline, None)
    plan = StepPlan((Piece(sequence(8), 8, 1, samples=True),))
    for _ in range(200):
        book.add(TakenStep(plan, False, 1.0, 1.0001, 1.0))
        assert len(book._uncounted) < 64
    book.settle()
    assert len(timeline.since(0.0).steps) == 200


# -- energy


def rapl(folder: Path, name: str, now_uj: int, range_uj: int = 1_000_000) -> Path:
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{now_uj}\n")
    (folder / "max_energy_range_uj").write_text(f"{range_uj}\n")
    return folder / "energy_uj"


def test_rapl_counts_on_when_its_counter_wraps_and_takes_packages_alone(tmp_path: Path) -> None:
    counter = rapl(tmp_path / "intel-rapl:0", "package-0", 900_000)
    rapl(tmp_path / "intel-rapl:0:0", "core", 1)
    (tmp_path / "intel-rapl:1").mkdir()  # not to be read
    (found,) = energy.rapl_packages(tmp_path)
    assert (found.device, found.joules(), found.watts()) == ("package-0", 0.0, None)
    counter.write_text("950000")
    assert found.joules() == 0.05
    counter.write_text("49999")
    assert found.joules() == pytest.approx(0.15)
    counter.unlink()
    assert found.joules() is None


class Nvml:
    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.total_mj = 5000
        self.is_broken = False

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's name
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        if self.is_broken:
            raise self.NVMLError("not supported")
        return self.total_mj

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:  # noqa: N802
        if self.is_broken:
            raise self.NVMLError("not supported")
        return 250_500


def test_nvml_counts_from_the_workers_start() -> None:
    nvml = Nvml()
    (found,) = energy.gpu("GPU-1", nvml)
    nvml.total_mj += 1500
    assert (found.joules(), found.watts()) == (1.5, 250.5)
    nvml.is_broken = True
    assert (found.joules(), found.watts()) == (None, None)


def test_a_gpu_that_does_not_tell_has_no_source() -> None:
    nvml: Any = Nvml()
    nvml.is_broken = True
    assert energy.gpu("GPU-1", nvml) == []


# -- the port


async def test_the_port_answers_metrics_and_nothing_else() -> None:
    server = MetricsServer(lambda: b"baton_x 1\n")
    port = server.bind("127.0.0.1", 0)
    await server.start()
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            found = await client.get("/metrics?x=y")
            assert (found.status_code, found.text) == (200, "baton_x 1\n")
            assert found.headers["content-type"].startswith("text/plain; version=0.0.4")
            assert (await client.get("/")).status_code == 404
            refused = await client.post("/metrics")
            assert (refused.status_code, refused.headers["allow"]) == (405, "GET, HEAD")
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"\x16\x03\x01 what is this\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
        writer.close()
    finally:
        await server.close()


async def test_a_client_that_says_nothing_or_too_much_is_let_go() -> None:
    config = MetricsServerConfig(request_timeout_s=0.3, max_connections=1, max_head_bytes=64)
    server = MetricsServer(lambda: b"", config)
    port = server.bind("127.0.0.1", 0)
    await server.start()
    try:
        silent, to_silent = await asyncio.open_connection("127.0.0.1", port)
        second, to_second = await asyncio.open_connection("127.0.0.1", port)
        assert await silent.read() == b""  # it makes room
        assert await second.read() == b""  # timed out
        talker, to_talker = await asyncio.open_connection("127.0.0.1", port)
        to_talker.write(b"x" * 1000)
        assert (await talker.read()).startswith(b"HTTP/1.1 431 ")
        for writer in (to_silent, to_second, to_talker):
            writer.close()
    finally:
        await server.close()


async def test_a_defect_in_a_reader_is_an_error_and_not_the_end(caplog: pytest.LogCaptureFixture) -> None:
    server = MetricsServer(lambda: bytes(math.floor(1 / 0)))
    port = server.bind("127.0.0.1", 0)
    await server.start()
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            assert (await client.get("/metrics")).status_code == 500
            assert (await client.get("/metrics")).status_code == 500
    finally:
        await server.close()
    assert "metrics could not be read" in caplog.text


def test_a_port_that_is_taken_stops_the_start() -> None:
    first, second = MetricsServer(bytes), MetricsServer(bytes)
    port = first.bind("127.0.0.1", 0)
    try:
        with pytest.raises(BadConfig, match="metrics"):
            second.bind("127.0.0.1", port)
    finally:
        asyncio.run(first.close())
