"""The demo model: task generator, trainer, weights. What the demo, the cluster tests and quality checks ask."""

from __future__ import annotations

from pathlib import Path

MODEL_DIR: Path = Path(__file__).resolve().parent / "model"
