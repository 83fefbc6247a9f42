"""Low-rank adapters on their way out: merged into the weights, or alone in PEFT's format.

Litespark's linears multiply together what Hugging Face keeps apart: one B has the rows of q, k and
v, and one A serves all three.  PEFT wants an A and a B for each, so A is written three times and
the rows of B go where the weight's rows go (`table.py`); the product is the same.

Shapes: r rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from litespark.checkpoint.folder import CONFIG
from litespark.checkpoint.hf.family import Family
from litespark.checkpoint.hf.folder import write_json
from litespark.checkpoint.hf.read import CheckpointReader
from litespark.checkpoint.hf.registry import family_of_model
from litespark.checkpoint.hf.staging import refuse_taken, staged
from litespark.checkpoint.hf.table import Entry, to_hf
from litespark.checkpoint.run_state import RunState
from litespark.config.load import load_config
from litespark.config.post_training import LoraConfig
from litespark.config.schema import ModelConfig, RunConfig
from litespark.errors import UserError
from litespark.modules.low_rank import A_NAME, ADAPTER, B_NAME

WEIGHTS, CONFIG_JSON = "adapter_model.safetensors", "adapter_config.json"
_WEIGHT = ".weight"


@dataclass(frozen=True)
class _Matrix(Entry):
    """A or B of a linear, or of one layer's; `hf_names` are those of the weight's parts."""

    shape: tuple[int, ...] = ()

    def stored_shape(self, model: ModelConfig) -> tuple[int, ...]:
        """Shape of the stored matrix, without the layer axis."""
        return self.shape


class AdaptedReader(CheckpointReader):
    """A checkpoint's tensors with its adapters added, as training computes with them.

    Args:
        lora: what the adapters are.
        The others are `CheckpointReader`'s.
    """

    def __init__(
        self, checkpoint: Path, family: Family, model: ModelConfig, lora: LoraConfig
    ) -> None:
        super().__init__(checkpoint, family, model)
        self.lora = lora

    def read(
        self, entry: Entry, layer: int | None, start: int = 0, stop: int | None = None
    ) -> Tensor:
        """Rows of a tensor, merged where it has an adapter; see `CheckpointReader.read`."""
        rows = super().read(entry, layer, start, stop)
        if not self.is_target(entry):
            return rows
        a_entry, b_entry = self.matrices(entry)
        b = super().read(b_entry, layer, start, stop)
        a = super().read(a_entry, layer)
        return torch.addmm(rows.float(), b.float(), a.float(), alpha=self.lora.scale).to(rows.dtype)

    def is_target(self, entry: Entry) -> bool:
        """Whether a stored tensor has an adapter."""
        linear = entry.key.removesuffix(_WEIGHT).rpartition(".")[2]
        return entry.key.endswith(_WEIGHT) and linear in self.lora.targets

    def matrices(self, entry: Entry) -> tuple[Entry, Entry]:
        """A [r, columns] and B [rows, r] of a stored weight."""
        rows, columns = entry.stored_shape(self.model)
        prefix = f"{entry.key.removesuffix(_WEIGHT)}.{ADAPTER}."
        a = _Matrix(entry.hf_names, prefix + A_NAME, (), shape=(self.lora.rank, columns))
        b = _Matrix(entry.hf_names, prefix + B_NAME, (), entry.rule, shape=(rows, self.lora.rank))
        return a, b

    def peft_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and value of every tensor of PEFT's file."""
        for entry, layer in self.tensors():
            if not self.is_target(entry):
                continue
            a_entry, b_entry = self.matrices(entry)
            a = super().read(a_entry, layer)
            b = super().read(b_entry, layer)
            for name, part in to_hf(b_entry, layer, b, self.model):
                module = f"base_model.model.{name.removesuffix(_WEIGHT)}"
                yield f"{module}.lora_A.weight", a.clone()
                yield f"{module}.lora_B.weight", part.contiguous()


def open_reader(checkpoint: Path, family: Family, model: ModelConfig) -> CheckpointReader:
    """The tensors of a checkpoint, with its adapters merged if it has any.

    Raises:
        UserError: the checkpoint cannot be read.
    """
    config = _config_of(checkpoint)
    if config is None or config.lora is None:
        return CheckpointReader(checkpoint, family, model)
    return AdaptedReader(checkpoint, family, model, config.lora)


def export_adapter(checkpoint: Path, out_dir: Path) -> int:
    """Write the adapters of `checkpoint` as a folder that `peft` loads; how many numbers they have.

    To be called inside `single_process`.

    Raises:
        UserError: the checkpoint has no adapters or cannot be read, or `out_dir` is taken.
    """
    from safetensors.torch import save_file

    model = RunState.read(checkpoint).model_config()
    config = _config_of(checkpoint)
    if config is None or config.lora is None:
        raise UserError(
            str(checkpoint), "holds no low-rank adapters", "Export it whole, without --adapter."
        )
    refuse_taken(out_dir)
    reader = AdaptedReader(checkpoint, family_of_model(model), model, config.lora)
    tensors = dict(reader.peft_tensors())
    modules = sorted({name.split(".")[-3] for name in tensors})
    with staged(out_dir, {"adapter_of": str(checkpoint.resolve())}, resume=False) as staging:
        save_file(tensors, staging.folder / WEIGHTS, metadata={"format": "pt"})
        write_json(
            staging.folder / CONFIG_JSON,
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": config.run.init_from,
                "r": config.lora.rank,
                "lora_alpha": config.lora.alpha,
                "lora_dropout": 0.0,
                "target_modules": modules,
                "bias": "none",
                "fan_in_fan_out": False,
                "inference_mode": True,
            },
        )
    return sum(tensor.numel() for tensor in tensors.values())


def _config_of(checkpoint: Path) -> RunConfig | None:
    path = checkpoint / CONFIG
    return load_config(path) if path.is_file() else None
