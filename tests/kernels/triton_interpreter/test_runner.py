"""The runner on Triton's kernels: recorded steps are the same steps, the device draws what the sampler would.

Nothing is recorded under the interpreter; the same code runs on the same padded inputs.
"""

from __future__ import annotations

import queue
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from baton.clock import MonotonicClock
from baton.types import Embedding, PromptLogprobs, SequenceSpec
from engine.blocks import BlockPool
from engine.config import EngineConfig
from engine.events import EngineEvent, Output
from engine.fake_devices import FakeDevices, FakeGpuMemory
from engine.replica import Replica, StepUnderway
from engine.runner import Runner
from engine.sampler import Sampler
from engine.schedule import Scheduler
from engine.scheduler_config import SchedulerConfig
from engine.step import StepPlan
from tests.support import bad_logits
from tests.support.engine_driver import Driver, random_prompt, spec
from tests.support.models import ORACLE_CASES, VOCAB_SIZE


def test_a_step_recorded_or_not_is_the_same_step(tmp_path: Path) -> None:
    case = next(c for c in ORACLE_CASES if c.name == "llama-gqa2-d32")
    folder = case.save(tmp_path / "model")
    kinds: list[dict[str, object]] = [{}, {"temperature": 1.0, "seed": 5, "top_p": 0.9}, {"repetition_penalty": 1.3}]
    runs = []
    for max_graph_seqs in (4, 0):
        config = EngineConfig(dtype="float16", num_blocks=8, kernels="triton", max_graph_seqs=max_graph_seqs)
        driver = Driver(Runner.load(folder, config))
        prompts = [random_prompt(n, VOCAB_SIZE) for n in (5, 63, 1)]
        sequences = [driver.add(spec(f"{i}", p, **kinds[i])) for i, p in enumerate(prompts)]
        steps = []
        for chosen in (sequences, sequences, sequences[:1]):
            steps.append(driver.step([driver.piece(s, 1000) for s in chosen]))
        graphs = driver.runner._graphs
        assert (graphs is not None) == bool(max_graph_seqs)
        if graphs is not None and (graph := graphs.find(1, 8)) is not None:
            with torch.inference_mode():
                assert graph.replay().token_ids.tolist() == sequences[0].token_ids[-1:]
        runs.append((steps, [s.token_ids for s in sequences]))
    (recorded, tokens), (plain, plain_tokens) = runs
    assert tokens == plain_tokens
    for (_, ours), (_, theirs) in zip(recorded, plain, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_trial_of_what_memory_is_left_runs_the_largest_step_and_leaves_no_trace(tmp_path: Path) -> None:
    folder = next(c for c in ORACLE_CASES if c.name == "llama-gqa2-d32").save(tmp_path / "model")
    limits = {
        "kernels": "triton",
        "scheduler": SchedulerConfig(max_batch_tokens=12, max_num_seqs=3),
        "max_graph_seqs": 2,
    }
    request = spec("a", random_prompt(9, VOCAB_SIZE))
    given = Runner.load(folder, EngineConfig(num_blocks=8, **limits))  # type: ignore[arg-type]
    devices = FakeDevices(memory=FakeGpuMemory(1 << 30))
    measured = Runner.load(folder, EngineConfig(**limits), devices=devices)  # type: ignore[arg-type]
    assert measured.layout.num_blocks == int(0.9 * (1 << 30)) // (measured.layout.block_bytes * 2)
    assert measured._graphs is not None, "recorded again, on the cache that is served from"
    assert Driver(measured).generate(request).token_ids == Driver(given).generate(request).token_ids


@dataclass
class Counting:
    """The runner, with or without overlap; counts tokens that never passed the host on their way to the next step."""

    runner: Runner
    overlaps: bool
    num_fed: int = 0

    def enter_thread(self) -> None:
        self.runner.enter_thread()

    def launch(self, plan: StepPlan, on_layer: object = None) -> StepUnderway:
        self.num_fed += sum(p.token_is_on_device for p in plan.pieces)
        return self.runner.launch(plan, on_layer)  # type: ignore[arg-type]

    def forget(self, sequence_id: str) -> None:
        self.runner.forget(sequence_id)


@pytest.mark.parametrize("max_graph_seqs", [4, 0])
def test_steps_that_overlap_give_the_same_tokens(tmp_path: Path, max_graph_seqs: int) -> None:
    """Chunked prompts, stop tokens, memory that runs out, and rows whose logits are changed or reported."""
    case = next(c for c in ORACLE_CASES if c.name == "llama-gqa2-d32")
    config = EngineConfig(
        dtype="float32",
        block_tokens=16,
        num_blocks=7,
        kernels="triton",
        max_graph_seqs=max_graph_seqs,
        scheduler=SchedulerConfig(max_num_seqs=5),
    )
    runner = Runner.load(case.save(tmp_path / "model"), config)
    plain = [
        spec("a", random_prompt(30, VOCAB_SIZE), max_tokens=6),
        spec("b", random_prompt(3, VOCAB_SIZE), max_tokens=9, temperature=1.0, seed=7),
        spec("c", random_prompt(17, VOCAB_SIZE), max_tokens=9, stop_token_ids=tuple(range(0, VOCAB_SIZE, 3))),
        spec("d", random_prompt(30, VOCAB_SIZE, 1), max_tokens=5, temperature=0.7, seed=8, top_p=0.9),
    ]
    changed = [
        spec("e", random_prompt(4, VOCAB_SIZE), max_tokens=4, repetition_penalty=1.3),
        spec("f", random_prompt(5, VOCAB_SIZE), max_tokens=5, min_tokens=2, stop_token_ids=(1, 2)),
        spec("g", random_prompt(6, VOCAB_SIZE), max_tokens=3, logprobs=2),
        spec("h", random_prompt(21, VOCAB_SIZE), max_tokens=3, prompt_logprobs=2),
        spec("i", random_prompt(20, VOCAB_SIZE), max_tokens=1, pooling="mean"),
    ]
    (alone, _), (overlapped, num_fed) = (_serve(Counting(runner, o), [plain, changed]) for o in (False, True))
    assert alone == overlapped
    assert len(alone["i/0/0"]) == 2, "the embedding and a token"
    assert len(alone["h/0/0"]) == 20 + 3, "the prompt's tokens but the first, and what was generated"
    # All of them: no step waits for the host.
    assert num_fed > 15


def _serve(runner: Counting, waves: list[list[SequenceSpec]]) -> tuple[dict[str, list[object]], int]:
    pool = BlockPool(runner.runner.layout.num_blocks)
    limits = SchedulerConfig(block_tokens=16, max_model_tokens=100, max_batch_tokens=24, max_num_seqs=5, watermark=0.0)
    scheduler = Scheduler(limits, pool)
    engine = Replica(runner, scheduler, num_layers=runner.runner.layout.num_layers, clock=MonotonicClock())
    heard: queue.Queue[EngineEvent] = queue.Queue()

    def listen(events: list[EngineEvent]) -> None:
        for event in events:
            heard.put(event)

    found: dict[str, list[object]] = {}
    engine.start()
    try:
        for wave in waves:
            for one in wave:
                engine.submit(one, hands_off=False, listener=listen)
            num_open = len(wave)
            while num_open:
                event = heard.get(timeout=60)
                if isinstance(event, PromptLogprobs | Embedding):
                    told = event.logprobs if isinstance(event, PromptLogprobs) else [event.values]
                    found.setdefault(event.sequence_id, []).extend(told)
                    continue
                assert isinstance(event, Output)
                found.setdefault(event.sequence_id, []).append((event.chunk.token_ids, event.chunk.logprobs))
                num_open -= event.chunk.finish_reason is not None
        engine.check()
        assert pool.num_free == pool.num_blocks
    finally:
        assert engine.stop(30)
    return found, runner.num_fed


def test_a_graph_is_as_large_as_it_must_be(tmp_path: Path) -> None:
    case = next(c for c in ORACLE_CASES if c.name == "llama-gqa2-d32")
    runner = Runner.load(
        case.save(tmp_path / "model"),
        EngineConfig(dtype="float32", num_blocks=2, kernels="triton", scheduler=SchedulerConfig(max_num_seqs=3)),
    )
    graphs = runner._graphs
    assert graphs is not None
    assert graphs.find(1, 10) is not graphs.find(2, 10)
    assert graphs.find(3, 128) is not None
    assert graphs.find(4, 10) is None
    assert graphs.find(1, 129) is None


def test_the_device_draws_what_the_sampler_would(tmp_path: Path) -> None:
    case = next(c for c in ORACLE_CASES if c.name == "llama-gqa2-d32")
    folder = case.save(tmp_path / "model")
    runner = Runner.load(folder, EngineConfig(dtype="float32", num_blocks=20, kernels="triton"))
    driver, sampler = Driver(runner), Sampler(VOCAB_SIZE)
    kinds: list[dict[str, object]] = [
        {}, {"temperature": 1.2, "seed": 2**63}, {"temperature": 0.8, "top_k": 9, "top_p": 0.7, "min_p": 0.01},
        {"logprobs": 2}, {"temperature": 1.0, "logit_bias": {3: 50.0}}, {"min_tokens": 8, "stop_token_ids": (5,)},
        {"temperature": 1.0, "frequency_penalty": 1.5},
    ]  # fmt: skip
    sequences = [driver.add(spec(f"{i}", (i + 1, 2 * i), **kind)) for i, kind in enumerate(kinds)]
    for is_told in (False, False, True):
        plan = StepPlan(tuple(driver.piece(s, 1000) for s in sequences))
        told: list[int] = []
        launched = runner.launch(plan, told.append if is_told else None)
        assert told == list(range(runner.layout.num_layers)) * is_told
        expected = sampler.sample(launched.logits.clone(), launched.sequences).sampled
        found = launched.result().sampled
        assert found == expected
        for s in sequences:
            s.num_computed = len(s.token_ids)
            s.token_ids += found[s.sequence_id].token_ids


@pytest.mark.parametrize("max_graph_seqs", [8, 0])
def test_a_token_whose_embedding_is_nan_ends_those_that_meet_it_alone(tmp_path: Path, max_graph_seqs: int) -> None:
    """Also where the next step was launched with a token that was not drawn."""
    folder, sequences = bad_logits.CASE.save(tmp_path / "model"), bad_logits.specs()
    config = EngineConfig(
        dtype="float32", block_tokens=bad_logits.BLOCK_TOKENS, num_blocks=bad_logits.NUM_BLOCKS, kernels="triton",
        scheduler=SchedulerConfig(max_num_seqs=8), max_graph_seqs=max_graph_seqs,
    )  # fmt: skip
    runner = Runner.load(folder, config)
    clean = bad_logits.serve(runner, Counting(runner, False), sequences)
    token_id = bad_logits.token_to_spoil(clean, sequences, "greedy")
    bad_logits.spoil(folder, token_id)
    runner = Runner.load(folder, config)
    counting = Counting(runner, True)
    wanted = bad_logits.expected(clean, sequences, token_id)
    assert bad_logits.serve(runner, counting, sequences) == wanted
    assert {code for _, code in wanted.values()} == {"", "BadLogits"}
    assert counting.num_fed > 5
