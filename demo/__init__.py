"""The demo model: tasks with known answers, training, weights. Used by the demo, cluster tests and quality checks."""

from __future__ import annotations

from pathlib import Path

MODEL_DIR: Path = Path(__file__).resolve().parent / "model"
