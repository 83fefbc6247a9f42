"""Settings that every test needs."""

from __future__ import annotations

import pytest

from megatron_patches import applied_patches, revert_patches


@pytest.fixture(autouse=True)
def _no_patches_left_over():
    """A test that applies patches in this process must not change what the next one sees."""
    yield
    if applied_patches():
        revert_patches()
