"""A context that operators make shorter than the model's."""

from __future__ import annotations

import pytest

from baton.errors import BadConfig
from engine.config import EngineConfig
from engine.model_config import ModelConfig
from engine.runner import Runner
from tests.support.root import ROOT

DEMO = ROOT / "demo" / "model"


def test_a_context_can_be_shorter_than_the_models_and_not_longer() -> None:
    whole = ModelConfig.from_folder(DEMO)
    assert whole.within(None) is whole
    with pytest.raises(BadConfig, match=f"expected at most {whole.max_model_tokens}, the model's context"):
        whole.within(whole.max_model_tokens + 1)
    found = [Runner.load(DEMO, EngineConfig(num_blocks=8, max_model_tokens=n)) for n in (None, 128)]
    assert [runner.description.max_model_tokens for runner in found] == [whole.max_model_tokens, 128]
    # The same weights: profiles and caches of one are those of the other.
    assert found[0].description.fingerprint == found[1].description.fingerprint
