"""Each patch is still needed: the run it repairs fails without it, and is right with it.

The day a test of the first kind fails, upstream has repaired the fault and the patch can go.  The
patches against wrong numbers are in `test_silent_faults.py`.
"""

from __future__ import annotations

import threading

import pytest
import torch
import torch.distributed.checkpoint
from torch.distributed.checkpoint import DefaultLoadPlanner

from megatron_patches import apply_patches
from megatron_patches.registry import PATCH_NAMES
from tests.support.spawn import RankFailed, run_distributed
from tests.support.tiny_mcore import Layout, TinyRun, train

pytestmark = pytest.mark.distributed

SINGLE = Layout()
RECOMPUTED_NORMS = Layout(
    config={"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}
)
FUSED_ACCUMULATION = Layout(config={"gradient_accumulation_fusion": True})
# What rounding in another order makes of the loss in a few Adam steps.
ROUNDING = 1e-5


def patch(without):
    apply_patches("cpu", only=[name for name in PATCH_NAMES if name != without])


def _train(rank, world_size, layout, without):
    patch(without)
    return train(layout, 3)


def _save(rank, world_size, folder, without):
    patch(without)
    run = TinyRun(Layout(distopt=True))
    run.steps(0, 1)
    run.save(folder)


def _load_into_a_fresh_optimizer(rank, world_size, folder, without):
    patch(without)
    TinyRun(Layout(distopt=True)).state_dict(is_loading=True)


@pytest.mark.parametrize(
    ("without", "layout", "world_size", "error"),
    [
        ("current_device", SINGLE, 1, "not compiled with CUDA"),
        ("cuda_literals", SINGLE, 1, "not compiled with CUDA"),
        ("type_names", SINGLE, 1, "AssertionError"),
        ("type_names", Layout(distopt=True), 1, "Wrapped parameters must be one of"),
        ("rng", SINGLE, 1, "not compiled with CUDA|CUDA"),
        ("synchronize", Layout(pp=2), 2, "not compiled with CUDA"),
        ("recompute_without_te", RECOMPUTED_NORMS, 1, "FP8GlobalStateManager"),
        ("wgrad_fusion", FUSED_ACCUMULATION, 1, "fused_weight_gradient_mlp_cuda"),
    ],
)
def test_training_fails_without(without, layout, world_size, error):
    with pytest.raises(RankFailed, match=error):
        run_distributed(_train, world_size, layout, without)


@pytest.mark.parametrize(
    ("without", "step", "error"),
    [
        ("tensor_cuda", _save, "not compiled with CUDA"),
        ("distopt_torch_adam", _load_into_a_fresh_optimizer, "AssertionError"),
    ],
)
def test_checkpoints_fail_without(without, step, error, tmp_path):
    with pytest.raises(RankFailed, match=error):
        run_distributed(step, 2, str(tmp_path), without)


@pytest.mark.parametrize("layout", [RECOMPUTED_NORMS, FUSED_ACCUMULATION], ids=["norms", "fused"])
def test_repaired_options_give_the_losses_of_the_plain_run(layout):
    expected = run_distributed(_train, 1, SINGLE, None)[0]
    losses = run_distributed(_train, 1, layout, None)[0]
    for (loss, norm), (expected_loss, expected_norm) in zip(losses, expected, strict=True):
        assert loss == pytest.approx(expected_loss, abs=ROUNDING)
        assert norm == pytest.approx(expected_norm, rel=1e-4)


def _start_method_of_the_results_queue(rank, world_size, without):
    import multiprocessing

    from megatron.core.dist_checkpointing.strategies import filesystem_async

    patch(without)
    queue = filesystem_async._get_write_results_queue()
    queue.put(1)
    assert queue.get() == 1
    assert filesystem_async._get_write_results_queue() is queue
    return [type(child).__name__ for child in multiprocessing.active_children()]


@pytest.mark.parametrize(
    ("without", "kind"), [("ckpt_fork_queue", "SpawnProcess"), (None, "ForkProcess")]
)
def test_the_results_queue_is_forked_instead_of_spawned(without, kind):
    assert run_distributed(_start_method_of_the_results_queue, 1, without) == [[kind]]


@pytest.mark.parametrize(
    ("without", "readers"),
    [("read_side_by_side", {"MainThread"}), (None, {"checkpoint-read"})],
)
def test_a_rank_reads_a_checkpoint_with_threads(without, readers, tmp_path):
    patch(without)
    from megatron.core.dist_checkpointing.strategies.torch import _get_filesystem_reader

    threads = set()

    class Watching(DefaultLoadPlanner):
        def commit_tensor(self, read_item, tensor):
            threads.add(threading.current_thread().name.partition("_")[0])

    written = {f"tensor{number}": torch.full((3, number), float(number)) for number in range(9)}
    torch.distributed.checkpoint.save(dict(written), checkpoint_id=tmp_path, no_dist=True)
    read = {name: torch.full_like(value, torch.nan) for name, value in written.items()}
    reader = _get_filesystem_reader(tmp_path, cache_metadata=True)
    torch.distributed.checkpoint.load(read, storage_reader=reader, planner=Watching(), no_dist=True)
    assert threads == readers
    torch.testing.assert_close(read, written, rtol=0, atol=0)
