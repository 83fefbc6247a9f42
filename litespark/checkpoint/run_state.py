"""The part of a checkpoint that is no tensor: where the run stood, and of which model."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from litespark.config.schema import ModelConfig, RunConfig
from litespark.errors import UserError, raise_user_errors
from litespark.parallel.layout import RankLayout
from litespark.version import __version__

FORMAT_VERSION = 2
FILE_NAME = "run_state.json"

# What may differ between the model that was saved and the one that loads it.
_NOT_SHAPE = {
    *("preset", "backend", "attention", "init_std", "max_sequence_length", "sliding_window"),
    "family",
    "vocab_padding_multiple",  # what counts is the padded size, which is compared by itself
}


@dataclass(frozen=True)
class RunState:
    """Where a run stood when its checkpoint was written.

    `optimizer_step` counts the updates, which a guard may have let fall behind the steps;
    `fp8_scales` holds, for each tensor with a delayed scale, its largest values so far, and the
    scale of each weight that exists in FP8 alone; `bf16_layers` the layers, counted from 1, that
    the FP8 guard has moved to BF16; `weights_only` says that there is no optimizer state, as after
    an import.
    """

    format_version: int
    step: int
    optimizer_step: int
    consumed_samples: int
    tokens: int
    seed: int
    precision: str
    distributed_optimizer: bool
    model: dict[str, Any]
    data: dict[str, Any]
    layout: dict[str, int]
    versions: dict[str, str]
    fp8_scales: dict[str, list[float]] = field(default_factory=dict)
    bf16_layers: list[int] = field(default_factory=list)
    weights_only: bool = False

    @classmethod
    def of(
        cls,
        config: RunConfig,
        layout: RankLayout,
        *,
        step: int,
        consumed_samples: int,
        optimizer_step: int | None = None,
        fp8_scales: dict[str, list[float]] | None = None,
        bf16_layers: list[int] | None = None,
        weights_only: bool = False,
    ) -> RunState:
        """The state of a run at `step`."""
        return cls(
            format_version=FORMAT_VERSION,
            step=step,
            optimizer_step=step if optimizer_step is None else optimizer_step,
            consumed_samples=consumed_samples,
            tokens=consumed_samples * config.data.sequence_length,
            seed=config.seed,
            precision=config.precision.mode,
            distributed_optimizer=config.parallel.distributed_optimizer,
            model=config.model.model_dump(mode="json"),
            data=config.data.model_dump(mode="json"),
            layout=asdict(layout),
            versions=_versions(),
            fp8_scales=fp8_scales or {},
            bf16_layers=bf16_layers or [],
            weights_only=weights_only,
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
            text = path.read_text(encoding="utf-8")
            values = json.loads(text)
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
            state = TypeAdapter(cls).validate_json(text, strict=True)
            state.model_config()
        except ValidationError as error:
            problem = "; ".join(f"{e['loc']}: {e['msg']}" for e in error.errors()[:3])
            raise UserError(str(path), f"is not what was written ({problem})", fix) from None
        return state

    def model_config(self) -> ModelConfig:
        """The shape of the saved model."""
        return ModelConfig.model_validate(self.model)


def check_same_model(state: RunState, checkpoint: Path, model: ModelConfig) -> None:
    """Refuse to load a checkpoint into a model of another shape.

    Raises:
        UserError: names every key that differs, with both values.
    """
    saved = state.model_config()
    errors = shape_differences(
        model,
        saved,
        f"the checkpoint {checkpoint} was written with",
        "Set it to the checkpoint's value, or start a new run in another run.output_dir.",
    )
    rows = saved.padded_vocab_size
    if model.padded_vocab_size != rows:
        errors.append(
            UserError(
                f"model.vocab_padding_multiple = {model.vocab_padding_multiple}",
                f"pads the vocabulary to {model.padded_vocab_size} rows, and the checkpoint "
                f"{checkpoint} has {rows}",
                f"Set it to {state.model.get('vocab_padding_multiple')}; only a tensor-parallel "
                f"size that divides {rows} can load this checkpoint.",
            )
        )
    raise_user_errors(errors)


def shape_differences(
    model: ModelConfig, other: ModelConfig, clause: str, fix: str
) -> list[UserError]:
    """One error for each key by which a model computes something else than `other`.

    `clause` is followed by the value of `other`.
    """
    found = other.model_dump(mode="json")
    return [
        UserError(f"model.{key} = {value}", f"{clause} {found[key]}", fix)
        for key, value in model.model_dump(mode="json").items()
        if key not in _NOT_SHAPE and found[key] != value
    ]


def _versions() -> dict[str, str]:
    found = {"litespark": __version__}
    for package in ("torch", "megatron-core", "transformer-engine"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
