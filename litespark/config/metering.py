"""The configuration of meters: what a kilowatt-hour means, and where live figures are served."""

from __future__ import annotations

from pydantic import Field

from litespark.config.section import Section


class MeteringConfig(Section):
    """Energy beyond joules, and figures for a monitoring system."""

    grid_grams_per_kwh: float | None = Field(
        default=None,
        gt=0,
        description="CO2e of a kilowatt-hour where the run is, in grams; with it the report states "
        "kg CO2e. null: not stated. The grid's operator or ember-energy.org has the figure.",
    )
    check_power: bool = Field(
        default=False,
        description="Poll each GPU's power ten times a second and integrate it, as a second "
        "opinion on the energy counter; the last event of the run has both.",
    )
    prometheus_port: int | None = Field(
        default=None,
        ge=1024,
        le=65535,
        description="Port on which the first rank serves the newest line of metrics to Prometheus; "
        "needs the extra litespark[prometheus]. null: no server.",
    )
    prometheus_address: str = Field(
        default="127.0.0.1",
        description="Address that the server listens on; 0.0.0.0 lets other machines read it.",
    )
