"""The tree of tests: the packages' folders, helpers apart, and no test that needs another one."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.root import ROOT

TESTS = ROOT / "tests"
# What has tests and no folder with Python of its own.
NO_PACKAGES = {"docs", "proto"}
# The only test of `bench` that has to run under Triton's interpreter.
TESTS_OF_BENCH = ("unit/bench/", "support/bench/", "kernels/triton_interpreter/test_tune.py")
# Also in the programs that tests write as strings.
_IMPORT = re.compile(
    r"""(?:^|[;"'])[ ]*(?:from|import) ((?:tests|bench)\b[\w.]*)(?: import ([^;"'\n]*))?""", re.MULTILINE
)


def imports(text: str) -> list[str]:
    """Modules of tests and bench that a text imports; for `from a import b` it is both a and a.b."""
    found = []
    for module, names in _IMPORT.findall(text):
        found += [module, *(f"{module}.{name.split()[0]}" for name in names.strip("() ").split(",") if name.strip())]
    return found


def wrong_imports(path: str, text: str) -> list[str]:
    wrong = []
    for module in imports(text):
        is_bench = module.split(".")[0] == "bench"
        if is_bench and not path.startswith(TESTS_OF_BENCH):
            wrong.append(f"{path} imports {module}: only tests of bench may")
        elif not is_bench and module not in ("tests", "tests.support") and not module.startswith("tests.support."):
            wrong.append(f"{path} imports {module}: what tests share belongs to tests/support")
    return wrong


def test_wrong_imports_are_found() -> None:
    for text in ("from tests.unit.engine.test_a import b", "from tests import cluster", "import tests.unit"):
        assert wrong_imports("unit/engine/test_b.py", text), text
    for text in ("from bench import tune", 'run("import sys; import bench")', '_CODE = """\nimport bench\n"""'):
        assert wrong_imports("kernels/test_b.py", text), text
    for text in ("from tests.support.node import spec", "from tests.support import a, b", "from benchmarks import x"):
        assert wrong_imports("kernels/test_b.py", text) == [], text
    assert wrong_imports("unit/bench/test_b.py", "from bench.peers import x") == []


def test_no_test_imports_bench_or_another_test() -> None:
    files = [path for path in TESTS.rglob("*.py") if path != Path(__file__)]
    assert len(files) > 100
    assert [w for path in files for w in wrong_imports(str(path.relative_to(TESTS)), path.read_text())] == []


def test_helpers_are_in_support_and_tests_beside_it() -> None:
    for path in TESTS.rglob("*.py"):
        is_test = path.name.startswith("test_")
        is_support = path.is_relative_to(TESTS / "support")
        assert path.name in ("conftest.py", "__init__.py") or is_test != is_support, path


def test_unit_and_property_tests_are_in_the_folders_of_the_packages() -> None:
    for kind in ("unit", "properties"):
        for path in (TESTS / kind).rglob("*.py"):
            package = path.parent.relative_to(TESTS / kind)
            assert str(package) != ".", f"{path}: which package is this a test of?"
            assert package.name in NO_PACKAGES or (ROOT / package / "__init__.py").is_file(), f"{path}: no {package}/"
