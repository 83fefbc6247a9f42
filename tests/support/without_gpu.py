"""Importing this makes the GPU-only packages look absent; the ranks of tests are CPU processes."""

from litespark.parallel.device import prepare_megatron

prepare_megatron()
