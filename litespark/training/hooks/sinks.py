"""TensorBoard and Weights & Biases; both take the records of metrics.jsonl as they are."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from litespark.config.schema import RunConfig
from litespark.errors import MissingExtraError
from litespark.utils.files import write_text_atomically


class TensorBoardSink:
    """Writes every number of a record as a scalar."""

    def __init__(self, folder: Path, purge_step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=purge_step)

    def write(self, record: dict[str, Any]) -> None:
        """Write one record."""
        for key, value in record.items():
            if value is not None and key != "step":
                self.writer.add_scalar(key, value, record["step"])

    def close(self) -> None:
        """Flush and close."""
        self.writer.close()


class WandbSink:
    """Logs every record to a Weights & Biases run.

    Raises:
        MissingExtraError: the package wandb is not installed.
    """

    def __init__(self, project: str, config: RunConfig, folder: Path) -> None:
        try:
            import wandb  # type: ignore[import-not-found]
        except ImportError:
            raise MissingExtraError("wandb", "wandb", "logging.wandb_project") from None
        self.run = wandb.init(
            project=project,
            name=config.run.name,
            config=config.model_dump(by_alias=True, mode="json"),
            dir=str(folder),
            id=_wandb_id(folder),
            resume="allow",
        )

    def write(self, record: dict[str, Any]) -> None:
        """Write one record."""
        values = {key: value for key, value in record.items() if value is not None}
        self.run.log(values, step=record["step"])

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()


def _wandb_id(folder: Path) -> str:
    """The run's id at Weights & Biases, kept in its folder, so that a resumed run goes on there."""
    path = folder / "wandb_id.txt"
    if not path.exists():
        write_text_atomically(path, secrets.token_hex(8) + "\n")
    return path.read_text(encoding="utf-8").strip()
