"""Files that cannot be read say why and what to do; checkpoints that contradict themselves are refused by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from baton.errors import UnsupportedModel
from engine.weights import fingerprint
from tests.support.models import ORACLE_CASES

CASE = next(case for case in ORACLE_CASES if case.name == "llama-gqa2-d32")
NOBODY = 65534


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return CASE.save(tmp_path / "model")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return CASE.save(tmp_path / "model", max_shard_size="100KB")


def _lfs(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 548105171\n")


def _dangle(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent / "blobs" / "gone")


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _become_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _become_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_lfs, "is a git-lfs pointer and not the file itself: run `git lfs pull`"),
        (_dangle, "blobs/gone, which does not exist"),
        (_become_pipe, "is a pipe, socket or device"),
        (_become_folder, "is a folder, expected a file"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(b"\xff\xfe" * 50), "no whole safetensors|is not UTF-8"),
        (_cut, "no whole safetensors|is not JSON"),
    ],
    ids=["lfs", "dangling", "pipe", "folder", "empty", "binary", "cut"],
)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(
    folder: Path, name: str, spoil: Callable[[Path], object], said: str
) -> None:
    spoil(folder / name)
    with pytest.raises(UnsupportedModel) as caught:
        fingerprint(folder)
    assert str(folder / name) in caught.value.message
    assert any(one in caught.value.message for one in said.split("|"))


_CHILD = """
import os, sys
import engine.weights
# Loaded late otherwise, and the checkout may be in a folder that only its owner can enter.
import safetensors
from baton.errors import UnsupportedModel
if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid({nobody}, {nobody}, {nobody})
    os.setresuid({nobody}, {nobody}, {nobody})
from pathlib import Path
try:
    engine.weights.fingerprint(Path(sys.argv[1]))
except UnsupportedModel as error:
    print(error.message)
"""


@pytest.mark.parametrize(
    ("name", "mode", "cure"),
    [
        ("model.safetensors", 0o000, "chmod a+r"),
        ("config.json", 0o000, "chmod a+r"),
        (".", 0o600, "chmod a+x"),
        ("..", 0o600, "chmod a+x"),
    ],
)
def test_permission_denied_says_whose_and_which_mode(name: str, mode: int, cure: str) -> None:
    """In a process without access; root would read everything."""
    # Not below pytest's folders, which only their owner may enter.
    with tempfile.TemporaryDirectory() as above:
        Path(above).chmod(0o755)
        folder = CASE.save(Path(above) / "outer" / "model")
        for path in (folder.parent, folder, *folder.iterdir()):
            path.chmod(0o755)
        target = (folder / name).resolve()
        target.chmod(mode)
        command = [sys.executable, "-c", _CHILD.format(nobody=NOBODY), str(folder)]
        try:
            child = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
        finally:
            target.chmod(0o755)
    assert "permission denied" in child.stdout, child.stderr
    assert f"{target} belongs to uid {os.geteuid()}, has mode {mode:04o}" in child.stdout
    assert f"{cure} {target}" in child.stdout


def test_single_file_beside_an_index_is_refused(sharded: Path) -> None:
    """Transformers takes the one, others take the other."""
    save_file({"a": torch.zeros(1)}, sharded / "model.safetensors")
    with pytest.raises(UnsupportedModel, match="remove the one that is not the model"):
        fingerprint(sharded)


def test_a_shard_that_is_missing_is_named(sharded: Path) -> None:
    gone = max(sharded.glob("*.safetensors"))
    gone.unlink()
    with pytest.raises(UnsupportedModel, match=f"{gone.name} does not exist"):
        fingerprint(sharded)


def test_a_tensor_in_two_shards_is_named(sharded: Path) -> None:
    first, second, *_ = sorted(sharded.glob("*.safetensors"))
    name = next(iter(load_file(first)))
    save_file({**load_file(second), name: load_file(first)[name]}, second)
    with pytest.raises(UnsupportedModel, match=f"{second.name} and another file of its folder both hold {name}"):
        fingerprint(sharded)


def _edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_an_index_that_disagrees_with_its_files_is_refused(sharded: Path) -> None:
    _edit_index(sharded, lambda places: places.pop("model.norm.weight"))
    with pytest.raises(UnsupportedModel, match=r"disagree about model\.norm\.weight: the index says 'no file'"):
        fingerprint(sharded)
    _edit_index(sharded, lambda places: places.update({"model.norm.weight": places["model.embed_tokens.weight"]}))
    with pytest.raises(UnsupportedModel, match=r"disagree about model\.norm\.weight"):
        fingerprint(sharded)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', '{"weight_map": []}', "["])
def test_an_index_that_is_none_is_refused(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UnsupportedModel, match=r"index\.json"):
        fingerprint(sharded)


def test_shards_without_an_index_are_named(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(UnsupportedModel, match=r"holds model-00001-of-.*expected model\.safetensors or"):
        fingerprint(sharded)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.float64], ids=str)
def test_a_dtype_that_is_not_served_is_named(folder: Path, dtype: torch.dtype) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].to(dtype)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=r"model\.norm\.weight .* has dtype"):
        fingerprint(folder)


def test_buffers_of_older_checkpoints_are_not_weights(folder: Path) -> None:
    clean = fingerprint(folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    save_file(weights, folder / "model.safetensors")
    assert fingerprint(folder) == clean
