"""Settings that every test needs."""

from __future__ import annotations

import os

import pytest
import torch

from megatron_patches import applied_patches, revert_patches

if not torch.cuda.is_available():
    # Read when a kernel is defined, so before any module with kernels is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _no_patches_left_over():
    """A test that applies patches in this process must not change what the next one sees."""
    yield
    if applied_patches():
        revert_patches()
