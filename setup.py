"""Places the packages in the wheel; everything else is in pyproject.toml.

A checkout has them side by side. In a wheel only `baton` is a top-level name. The other packages have names that users
have themselves (`engine`, `router`, `cli`), so they are in `baton/_serving`, which only the `baton` command and the
processes it starts put on their path (see docs/decisions/0008-names.md).
"""

from setuptools import find_namespace_packages, setup

SERVING = (
    "cli",
    "decode_node",
    "demo",
    "engine",
    "kvtransfer",
    "loadgen",
    "planner",
    "prefill_node",
    "router",
    "worker",
)

# Folders without Python, as `demo/model`, count as packages: their files go along.
packages = find_namespace_packages(include=["baton", "baton.*"])
for name in SERVING:
    packages += [f"baton._serving.{found}" for found in find_namespace_packages(include=[name, f"{name}.*"])]

setup(packages=packages, package_dir={f"baton._serving.{name}": name for name in SERVING})
