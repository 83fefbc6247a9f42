"""What the tests of the binding share: an engine on the fake library."""

from __future__ import annotations

import pytest
import torch

from litespark.ops import cublaslt
from litespark.ops.cublaslt import Engine
from tests.unit.cublaslt.fake import FakeCuda, FakeLibrary


@pytest.fixture
def library() -> FakeLibrary:
    return FakeLibrary()


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def engine(library, cuda) -> Engine:
    torch.manual_seed(0)
    return Engine(library, cuda)


@pytest.fixture(autouse=True)
def small_workspace(monkeypatch):
    monkeypatch.setattr(cublaslt, "WORKSPACE_BYTES", 4096)
