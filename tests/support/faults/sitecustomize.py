"""Plants a fault into the ranks of a `litespark train` that has this folder in its PYTHONPATH.

Python imports a module of this name at its start.  FAULT says what happens to the rank FAULT_RANK
at its FAULT_PASS-th forward pass, or with FAULT_PLACE=save when it first writes a checkpoint, and
FAULT_ONCE a file that exists once it has happened.

PACE_UNTIL names a file: as long as it is not there, every forward pass of every rank takes half a
second more, so that a test can do something while the run goes on.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def break_down(fault: str) -> None:
    """What goes wrong."""
    if fault == "sleep":
        time.sleep(600)
    elif fault == "slow":
        time.sleep(16)
    elif fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "raise":
        raise RuntimeError("the dog ate the gradients")


def plant() -> None:
    """Put the fault into the forward step."""
    from litespark.objectives import objective

    original, once = objective.language_modelling_step, Path(os.environ["FAULT_ONCE"])
    passes = 0

    def faulty(device):
        clean = original(device)

        def forward_step(batches, model):
            nonlocal passes
            passes += 1
            if passes == int(os.environ["FAULT_PASS"]) and not once.exists():
                once.touch()
                break_down(os.environ["FAULT"])
            return clean(batches, model)

        return forward_step

    objective.language_modelling_step = faulty


def slow_down() -> None:
    """Make forward passes slow until the file is there."""
    from litespark.objectives import objective

    original, until = objective.language_modelling_step, Path(os.environ["PACE_UNTIL"])

    def slow(device):
        clean = original(device)

        def forward_step(batches, model):
            if not until.exists():
                time.sleep(0.5)
            return clean(batches, model)

        return forward_step

    objective.language_modelling_step = slow


def plant_in_save() -> None:
    """Put the fault into the writing of this rank's part of a checkpoint."""
    from litespark.checkpoint import save

    original, once = save.write_shards, Path(os.environ["FAULT_ONCE"])

    def faulty(copy, folder):
        if not once.exists():
            once.touch()
            break_down(os.environ["FAULT"])
        return original(copy, folder)

    save.write_shards = faulty


# A launcher has no rank; FAULT_ALONE says that this process is none.
if os.environ.get("RANK", os.environ.get("FAULT_ALONE")) == os.environ.get("FAULT_RANK", "none"):
    plant_in_save() if os.environ.get("FAULT_PLACE") == "save" else plant()

if "PACE_UNTIL" in os.environ and "RANK" in os.environ:
    slow_down()
