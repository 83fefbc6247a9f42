"""TensorBoard, Weights & Biases, MLflow and Prometheus take the records of metrics.jsonl.

All know a figure by its key there; Prometheus with `litespark_` before it, as is its custom.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litespark.config.schema import RunConfig
from litespark.errors import MissingExtraError, UserError
from litespark.utils.files import write_text_atomically

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

logger = logging.getLogger(__name__)


class TensorBoardSink:
    """Writes every number of a record as a scalar."""

    def __init__(self, folder: Path, purge_step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self.folder = folder
        self.writer: SummaryWriter | None = SummaryWriter(str(folder), purge_step=purge_step)

    def write(self, record: dict[str, Any]) -> None:
        """Write one record; after an error of the disk (told once) this and all that follow go."""
        if self.writer is None:
            return
        with self._without_disk_errors():
            for key, value in record.items():
                if value is not None and key != "step":
                    self.writer.add_scalar(key, value, record["step"])

    def close(self) -> None:
        """Flush and close."""
        if self.writer is None:
            return
        with self._without_disk_errors():
            self.writer.close()

    @contextmanager
    def _without_disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # of its writing thread; it takes nothing afterwards
            logger.warning(
                "TensorBoard's file in %s cannot be written (%s); metrics.jsonl has the rest",
                self.folder,
                error.strerror or error,
            )
            self.writer = None


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


class MlflowSink:
    """Logs every record to an MLflow run, which a resumed run goes on with.

    Raises:
        MissingExtraError: the package mlflow is not installed.
    """

    def __init__(self, experiment: str, config: RunConfig, folder: Path) -> None:
        try:
            import mlflow  # type: ignore[import-not-found]
        except ImportError:
            raise MissingExtraError("mlflow", "mlflow", "logging.mlflow_experiment") from None
        self.mlflow = mlflow
        mlflow.set_experiment(experiment)
        path = folder / "mlflow_run_id.txt"
        known = path.read_text(encoding="utf-8").strip() if path.exists() else None
        run = mlflow.start_run(run_id=known, run_name=config.run.name)
        if known is None:
            write_text_atomically(path, run.info.run_id + "\n")
            mlflow.log_dict(config.model_dump(by_alias=True, mode="json"), "config.yaml")

    def write(self, record: dict[str, Any]) -> None:
        """Write one record."""
        values = {key: float(value) for key, value in record.items() if value is not None}
        self.mlflow.log_metrics(values, step=record["step"])

    def close(self) -> None:
        """Finish the run."""
        self.mlflow.end_run()


class PrometheusSink:
    """Serves the newest value of every figure as a gauge; what is null has none.

    Raises:
        MissingExtraError: the package prometheus_client is not installed.
        UserError: the port cannot be listened on.
    """

    def __init__(self, port: int, address: str, config: RunConfig) -> None:
        try:
            from prometheus_client import CollectorRegistry, Gauge, start_http_server
        except ImportError:
            raise MissingExtraError(
                "prometheus_client", "prometheus", "metering.prometheus_port"
            ) from None
        self.registry = CollectorRegistry()
        self.make_gauge = Gauge
        self.gauges: dict[str, Any] = {}
        self.run_name = config.run.name
        try:
            self.server, self.thread = start_http_server(port, address, self.registry)
        except OSError as error:
            raise UserError(
                f"metering.prometheus_port = {port}",
                f"cannot be listened on at {address} ({error.strerror})",
                "Take another port, or leave it out.",
            ) from error

    def write(self, record: dict[str, Any]) -> None:
        """Take over one record; a figure that is null now is not shown with an old value."""
        for key, value in record.items():
            if value is not None:
                if key not in self.gauges:
                    self.gauges[key] = self.make_gauge(
                        f"litespark_{key}",
                        f"{key} in metrics.jsonl",
                        ["run"],
                        registry=self.registry,
                    )
                self.gauges[key].labels(self.run_name).set(value)
            elif key in self.gauges:
                self.gauges[key].clear()

    def close(self) -> None:
        """Stop the server."""
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def _wandb_id(folder: Path) -> str:
    """The run's id at Weights & Biases, kept in its folder, so that a resumed run goes on there."""
    path = folder / "wandb_id.txt"
    if not path.exists():
        write_text_atomically(path, secrets.token_hex(8) + "\n")
    return path.read_text(encoding="utf-8").strip()
