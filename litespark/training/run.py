"""One rank of a training run, from the configuration to the end."""

from __future__ import annotations

import logging

from litespark.checkpoint.sharded import bare_model
from litespark.config.schema import RunConfig
from litespark.models.layer_specs import slot_table
from litespark.parallel.groups import stop_process_group
from litespark.training.hooks.bad_steps import BadSteps
from litespark.training.hooks.checkpointing import Checkpointing
from litespark.training.hooks.energy import EnergyTotals
from litespark.training.hooks.evaluation import Evaluation
from litespark.training.hooks.exporting import Exporting
from litespark.training.hooks.fp8_guard import Fp8Guard
from litespark.training.hooks.metrics import MetricsWriter, StepMetrics
from litespark.training.hooks.recheck import Recheck
from litespark.training.hooks.signals import StopOnSignal
from litespark.training.hooks.stragglers import Stragglers
from litespark.training.hooks.watchdog import Watchdog
from litespark.training.launch import end_with_launcher
from litespark.training.loop import Hook, train
from litespark.training.setup import set_up
from litespark.training.state import TrainingRun

logger = logging.getLogger("litespark.training")


def run_training(config: RunConfig) -> None:
    """Set up, train, save; what `litespark train` does in each process.

    Raises:
        UserError, StoppedBySignal, GuardError: see `litespark.errors`.
    """
    end_with_launcher()
    try:
        run = set_up(config)
        try:
            _announce(run)
            if run.step < run.total_steps:
                train(run, build_hooks(run))
                run.record_event("finished", f"step {run.step}")
            else:
                if run.process.is_first:
                    logger.info("nothing to do: step %d of %d is done", run.step, run.total_steps)
                train(run, [Checkpointing()])  # the mirror may lack the last checkpoint
        finally:
            run.close()
    finally:
        stop_process_group()


def build_hooks(run: TrainingRun) -> list[Hook]:
    """The hooks in their order: guards first, then what looks, then what saves, then the stop."""
    writer = MetricsWriter(run)
    exporting, metrics = Exporting(run), StepMetrics(writer)
    checkpointing = Checkpointing(exporting.saved)
    hooks: list[Hook] = [metrics, Evaluation(writer), checkpointing, exporting]
    if run.config.precision.mode == "fp8":
        hooks.insert(2, Fp8Guard())
    hooks += [EnergyTotals(metrics), StopOnSignal(checkpointing.save_now)]
    return [Watchdog(), BadSteps(checkpointing), Recheck(), Stragglers(), *hooks]


def _announce(run: TrainingRun) -> None:
    if not run.process.is_first:
        return
    device, config = run.process.device, run.config
    logger.info(
        "%d processes on %s (%s): %s%s%s",
        run.process.world_size,
        device.name,
        device.distributed_backend,
        run.layout.describe(),
        ", sequence parallel" if config.parallel.sequence else "",
        ", distributed optimizer" if config.parallel.distributed_optimizer else "",
    )
    backend = bare_model(run.chunks[0]).backend
    slots = dict(slot_table(backend))
    for slot, module in slots.items():
        logger.info("  %-24s %-24s %s", slot, module, backend.name)
    run.append_event("modules", {"backend": backend.name, **slots})
