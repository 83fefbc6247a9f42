"""The queue over which checkpoint writer processes report.

Without: the first save *spawns* a manager process, which imports the main script again: a script
without a `__main__` guard fails, and any other waits 1.7 s
(`dist_checkpointing/strategies/filesystem_async.py`). Spawning protects a CUDA context that does
not exist here, so the process is forked (0.15 s). The manager of a rank that is killed outright
would stay behind; ours ends with its rank.

Goes when: megatron-core lets the caller choose the start method.
"""

from __future__ import annotations

from multiprocessing.managers import SyncManager
from typing import Any

from litespark.utils.processes import end_with_parent
from megatron_patches.attributes import Undo, replace_attributes
from megatron_patches.registry import Condition, Patch


def _apply() -> Undo:
    import torch.multiprocessing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    def results_queue() -> Any:
        if filesystem_async._results_queue is None:
            manager = SyncManager(ctx=torch.multiprocessing.get_context("fork"))
            manager.start(initializer=end_with_parent)
            filesystem_async._results_queue = manager.Queue()
        return filesystem_async._results_queue

    return replace_attributes((filesystem_async, "_get_write_results_queue", results_queue))


_WRITER = "megatron.core.dist_checkpointing.strategies.filesystem_async"
PATCH = Patch(
    name="ckpt_fork_queue",
    symbols=(f"{_WRITER}._get_write_results_queue", f"{_WRITER}._results_queue"),
    versions=">=0.16.1,<0.17",
    condition=Condition.CPU,
    why="the first checkpoint spawns a process that imports the main script again",
    remove_when="the start method of the results queue can be chosen",
    apply=_apply,
)
