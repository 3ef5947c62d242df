"""Exports the bench model to OpenVINO's format with unchanged weight width; prompts are token ids, so no tokenizer."""

from __future__ import annotations

import sys
from importlib import import_module


def convert(model: str, target: str) -> None:
    exporters = import_module("optimum.exporters.openvino")
    exporters.main_export(model, target, task="text-generation-with-past", device="cpu")


if __name__ == "__main__":
    convert(sys.argv[1], sys.argv[2])
