"""What a run does when something goes wrong: bad steps, hangs, lost ranks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from litespark.config.section import Section


class ResilienceConfig(Section):
    """What to do when something goes wrong."""

    bad_steps_in_a_row: int = Field(
        default=3,
        ge=1,
        description="A step with a gradient norm that is not finite, or with a loss spike, is not "
        "applied, and its batch is written to <output_dir>/bad_steps; after this many in a row "
        "`after_bad_steps` happens.",
    )
    after_bad_steps: Literal["stop", "roll_back"] = Field(
        default="stop",
        description="End with exit code 4, or go back to the last checkpoint and on with the data "
        "after the bad steps.",
    )
    max_roll_backs: int = Field(
        default=3, ge=1, description="Roll-backs after which the run ends with exit code 4."
    )
    spike_factor: float | None = Field(
        default=None,
        gt=1,
        description="A loss above this many times the mean of the last `spike_window` good steps "
        "is a spike; null: losses are not watched.",
    )
    spike_window: int = Field(
        default=100, ge=1, description="Good steps whose mean loss a spike is held against."
    )
    hang_seconds: float | None = Field(
        default=600.0,
        ge=5.0,
        description="A run in which nothing changes on some rank for this long (the first step "
        "compiles, and counts) ends with exit code 4, the stacks of all ranks in "
        "<output_dir>/hang.txt, and the names of those that did not arrive; null: never.",
    )
    collective_timeout_seconds: float = Field(
        default=1800.0,
        ge=60.0,
        le=86400.0,
        description="A collective that takes longer than this ends the run, in whole minutes; more "
        "than hang_seconds, whose message says more.",
    )
    recheck_every: int | None = Field(
        default=None,
        ge=1,
        description="Steps between two of which the losses are computed again before the update; a "
        "rank that does not find the same numbers twice has a fault of memory or arithmetic, and "
        "the run ends with exit code 4; null: never.  Each costs a third of a step.",
    )
    straggler_every: int | None = Field(
        default=100,
        ge=1,
        description="Steps between two comparisons of the ranks' forward passes; null: never.",
    )
    straggler_ratio: float = Field(
        default=1.2,
        gt=1,
        description="A rank that takes this many times its stage's median is named in a warning.",
    )
