"""Settings that every test needs."""

from __future__ import annotations

import logging
import os
import signal

import pytest
import torch

from megatron_patches import applied_patches, revert_patches
from tests.support import cli

# A shell starts what it puts in the background with SIGINT ignored, and children inherit that; the
# commands that tests start must hear Ctrl-C wherever the tests run.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if not torch.cuda.is_available():
    # Read when a kernel is defined, so before any module with kernels is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True, scope="session")
def _no_choices_in_the_home(tmp_path_factory: pytest.TempPathFactory):
    """What tests measure is kept under $XDG_CACHE_HOME: not the user's, whose runs would use it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _log_levels_as_they_were():
    """A test that runs a command in this process sets them, and the next would hear more."""
    loggers = [logging.getLogger(name) for name in (None, "litespark", "litespark.patches")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(autouse=True)
def _no_runs_left_over():
    """A test that fails while a command runs must not leave it to the tests that follow."""
    yield
    cli.end_all()


@pytest.fixture(autouse=True)
def _no_patches_left_over():
    """A test that applies patches in this process must not change what the next one sees."""
    yield
    if applied_patches():
        revert_patches()
