"""What the server of ranks imports before it forks them: for one thread each, and no GPU."""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")

from litespark.parallel.device import prepare_megatron

prepare_megatron()

import litespark.training.run  # noqa: E402,F401
