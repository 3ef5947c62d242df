"""docs/metrics.md and the code say the same: names, types and labels, in both directions."""

import re

from baton import PROTOCOL_VERSION
from baton.metrics import Metrics, add_process
from baton.types import KvLayout, ModelDescription, NodeDescription, NodeStatus, Role
from engine.blocks import BlockPool
from engine.cost import CostModel
from engine.fake import FakeRunner
from engine.replica import Replica
from engine.schedule import Scheduler
from engine.scheduler_config import SchedulerConfig
from router.cluster.config import PolicyConfig
from router.cluster.prefix_index import PrefixIndex
from router.metrics import RouterMetrics
from tests.support.root import ROOT
from worker.config import Peaks
from worker.energy import EnergySource
from worker.metrics import WorkerMetrics

DOCS = ROOT / "docs" / "metrics.md"
ROW = re.compile(r"^\| `(?P<name>[a-z0-9_:]+)` \| (?P<kind>counter|gauge|histogram) \|(?P<labels>[^|]*)\| \S", re.M)
LAYOUT = KvLayout(1, 8, 1, 8, 16, "float32")
COST = CostModel(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, ((None, 1),))
Facts = dict[str, tuple[str, tuple[str, ...]]]


class Meter:
    source, device = "rapl", "package-0"

    def joules(self) -> float:
        return 1.0

    def watts(self) -> float:
        return 2.0


class NoReceiver:
    num_digest_failures = 0


def node() -> NodeDescription:
    model = ModelDescription("m", "f", "float32", 100, 10)
    return NodeDescription(
        "n0", 1, Role.DECODE, "h:1", model, LAYOUT, PROTOCOL_VERSION, 1, "h", ("shm",), "cpu", "k", "0"
    )


def worker_metrics(energy: list[EnergySource], cost: CostModel | None, peaks: Peaks) -> Metrics:
    scheduler = Scheduler(SchedulerConfig(block_tokens=16), BlockPool(8))
    replica = Replica(FakeRunner(LAYOUT), scheduler, num_layers=1, clock=Still())
    counted = WorkerMetrics(node(), "c", cost, peaks, energy)
    counted.watch(replica, NoReceiver(), lambda: NodeStatus(Role.DECODE), lambda: False)  # type: ignore[arg-type]
    return counted.metrics


class Still:
    def now(self) -> float:
        return 0.0


def exposed(metrics: Metrics) -> Facts:
    return {f.exposed_name: (f.kind, f.label_names) for f in metrics.families.values()}


def written() -> Facts:
    found = {}
    for row in ROW.finditer(DOCS.read_text()):
        assert row["name"] not in found, f"{row['name']} is documented twice"
        found[row["name"]] = (row["kind"], tuple(re.findall(r"`(\w+)`", row["labels"])))
    return found


def test_every_metric_is_documented_and_every_documented_one_is_there() -> None:
    router = Metrics()
    add_process(router, "router")
    counted = RouterMetrics(router, has_vllm_names=True)
    counted.add_state(dict, list, lambda: True)
    counted.add_index(PrefixIndex(1))
    counted.add_policy(PolicyConfig())
    code = exposed(router) | exposed(worker_metrics([Meter()], COST, Peaks(1.0, 1.0)))
    docs = written()
    assert set(docs) - set(code) == set(), "documented, but not in the code"
    assert set(code) - set(docs) == set(), "in the code, but not documented"
    assert docs == code


def test_a_workers_caps_are_its_settings() -> None:
    shown = {family.name: family.samples[0].value for family in worker_metrics([], None, Peaks()).collect()}
    config = SchedulerConfig()
    caps = [shown[f"baton_{name}"] for name in ("max_batch_tokens", "max_num_seqs", "tbt_target_seconds")]
    assert caps == [config.max_batch_tokens, config.max_num_seqs, 0]


def test_names_follow_the_rules() -> None:
    for name, (kind, labels) in written().items():
        assert name.startswith(("baton_", "vllm:", "process_"))
        assert (kind == "counter") == name.endswith("_total")
        assert not set(labels) & {"cluster", "model_name", "node"}, "these are on all series of a process"
        ends = [f"baton_node_{how}_total" for how in ("losses", "drains", "moves")]
        assert "pool" not in labels or name in ("baton_nodes", *ends)


def test_what_is_not_known_is_absent() -> None:
    shown = {family.name for family in worker_metrics([], None, Peaks()).collect()}
    assert not {name for name in shown if re.search("peak|flops|model_bytes|energy|power", name)}
    shown = {family.name for family in worker_metrics([Meter()], COST, Peaks(1.0, 0.0)).collect()}
    assert "baton_energy_joules" in shown
    assert "baton_peak_flops" in shown
    assert "baton_peak_bytes_per_second" not in shown
