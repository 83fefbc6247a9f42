"""What a rank on a CPU imports of megatron-core, and what it does not."""

from __future__ import annotations

import subprocess
import sys

from tests.support import cli

SCRIPT = """
import sys, torch
compiler = torch.compile
from litespark.parallel.device import prepare_megatron
prepare_megatron()
import litespark.training.run
from megatron.core import jit
assert torch.compile is compiler
assert jit.jit_fuser(print) is print
assert "torch._inductor.compile_fx" not in sys.modules
"""


def test_no_compiler():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        env=cli.environment() | {"CUDA_VISIBLE_DEVICES": ""},
        cwd=cli.ROOT,
    )
    assert done.returncode == 0, done.stderr
