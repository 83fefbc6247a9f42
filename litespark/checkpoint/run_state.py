"""The part of a checkpoint that is no tensor: where the run stood, and of which model."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from litespark.config.schema import ModelConfig, RunConfig
from litespark.errors import UserError, raise_user_errors
from litespark.parallel.layout import RankLayout
from litespark.version import __version__

FORMAT_VERSION = 1
FILE_NAME = "run_state.json"

# What may differ between the model that was saved and the one that loads it.
_NOT_SHAPE = {"preset", "backend", "init_std", "max_sequence_length"}


@dataclass(frozen=True)
class RunState:
    """Where a run stood when its checkpoint was written."""

    format_version: int
    step: int
    consumed_samples: int
    tokens: int
    seed: int
    precision: str
    distributed_optimizer: bool
    model: dict[str, Any]
    data: dict[str, Any]
    layout: dict[str, int]
    versions: dict[str, str]

    @classmethod
    def of(
        cls, config: RunConfig, layout: RankLayout, *, step: int, consumed_samples: int
    ) -> RunState:
        """The state of a run at `step`."""
        return cls(
            format_version=FORMAT_VERSION,
            step=step,
            consumed_samples=consumed_samples,
            tokens=consumed_samples * config.data.sequence_length,
            seed=config.seed,
            precision=config.precision.mode,
            distributed_optimizer=config.parallel.distributed_optimizer,
            model=config.model.model_dump(mode="json"),
            data=config.data.model_dump(mode="json"),
            layout=asdict(layout),
            versions=_versions(),
        )

    def to_json(self) -> str:
        """The state as JSON text."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def read(cls, checkpoint: Path) -> RunState:
        """Read the state of a checkpoint folder.

        Raises:
            UserError: the folder is no checkpoint, or of a version this Litespark cannot read.
        """
        path = checkpoint / FILE_NAME
        fix = "Give a folder such as RUN/checkpoints/step_000000100."
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(str(path), f"cannot be read ({error})", fix) from None
        found = values.get("format_version") if isinstance(values, dict) else None
        if found != FORMAT_VERSION:
            raise UserError(
                f"{path}: format_version = {found}",
                f"this Litespark ({__version__}) reads version {FORMAT_VERSION}",
                "Use the Litespark that wrote it.",
            )
        try:
            return cls(**values)
        except TypeError as error:
            raise UserError(str(path), f"lacks or adds a key ({error})", fix) from None

    def model_config(self) -> ModelConfig:
        """The shape of the saved model."""
        return ModelConfig.model_validate(self.model)


def check_same_model(state: RunState, checkpoint: Path, model: ModelConfig) -> None:
    """Refuse to load a checkpoint into a model of another shape.

    Raises:
        UserError: names every key that differs, with both values.
    """
    wanted = model.model_dump(mode="json")
    errors = [
        UserError(
            f"model.{key} = {value}",
            f"the checkpoint {checkpoint} was written with {state.model.get(key)}",
            "Set it to the checkpoint's value, or start a new run in another run.output_dir.",
        )
        for key, value in wanted.items()
        if key not in _NOT_SHAPE and state.model.get(key) != value
    ]
    raise_user_errors(errors)


def _versions() -> dict[str, str]:
    found = {"litespark": __version__}
    for package in ("torch", "megatron-core", "transformer-engine"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
