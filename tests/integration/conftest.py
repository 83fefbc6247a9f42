"""What the tests of generated text share."""

from __future__ import annotations

import pytest


@pytest.fixture
def make_model():
    """Builds models of a given shape; the process group lives as long as the test."""
    from litespark.config.schema import RunConfig
    from litespark.training.single import single_process
    from tests.integration.tiny import build, tiny_values

    with single_process():

        def make(**shape):
            (model,) = build(RunConfig.model_validate(tiny_values("unused", **shape)))
            return model.eval()

        yield make
