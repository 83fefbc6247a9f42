"""A Hugging Face folder as a checkpoint that training starts from at any layout.

The model is not built: rows are read from the folder's files into blocks of stored tensors, and
these are appended to the checkpoint's files.  Memory holds one block of at most 256 MiB.  What the
folder says beside the weights (tokenizer, chat template, how to generate) is kept in the
checkpoint, from where an export takes it again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litespark.checkpoint.folder import CONFIG, LATEST, STATE, checkpoint_name
from litespark.checkpoint.hf.folder import GENERATION_CONFIG
from litespark.checkpoint.hf.source import HFSource
from litespark.checkpoint.hf.staging import Staging, refuse_taken, staged
from litespark.checkpoint.hf.state_writer import Block, blocks_of, write_state
from litespark.checkpoint.hf.table import Entry
from litespark.checkpoint.integrity import FileRecord, write_file, write_marker
from litespark.checkpoint.run_state import FILE_NAME, RunState
from litespark.checkpoint.tokenizer import TOKENIZER
from litespark.config.load import dump_config
from litespark.config.schema import ModelConfig, RunConfig
from litespark.config.validate_model import check_model
from litespark.data.tokenizers import load_tokenizer
from litespark.errors import UserError, raise_user_errors
from litespark.parallel.layout import RankLayout
from litespark.utils.files import fsync_path, write_text_atomically

IMPORT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_PRECISION = {torch.float32: "fp32", torch.bfloat16: "bf16"}
logger = logging.getLogger("litespark.hf")


@dataclass(frozen=True)
class Importing:
    """How to import.

    Attributes:
        dtype: a name in `IMPORT_DTYPES`; None takes the folder's own, float32 for others.
        resume: go on with what an import that was cut short has left.
        on_begin: told the size of all weights in bytes.
        on_bytes: told of each part of them that was written.
    """

    dtype: str | None = None
    resume: bool = False
    on_begin: Callable[[int], None] = lambda total: None
    on_bytes: Callable[[int], None] = lambda count: None


@dataclass(frozen=True)
class ImportedModel:
    """What was written: the checkpoint, the format of the weights, and how much of them."""

    checkpoint: Path
    dtype_name: str
    num_parameters: int
    num_bytes: int
    has_tokenizer: bool


@dataclass(frozen=True)
class WeightSource:
    """Weights that are not Litespark's, as an import reads them.

    Attributes:
        folder: where they are.
        model: their shape.
        entries: the stored tensors that they become.
        dtype: the format that holds all of them exactly.
        read: fills rows of a stored tensor, from a row on.
        companions: files to keep in the checkpoint's folder `tokenizer`, by name.
    """

    folder: Path
    model: ModelConfig
    entries: tuple[Entry, ...]
    dtype: torch.dtype
    read: Callable[[Entry, int | None, int, Tensor], None]
    companions: Mapping[str, Path] = field(default_factory=dict)


def import_hf(
    folder: Path, out_dir: Path, options: Importing, *, allow_pickle: bool = False
) -> ImportedModel:
    """Write the model of a Hugging Face folder as a checkpoint.

    Args:
        folder: config.json, weights and, if there, a tokenizer.
        out_dir: a folder that does not exist or is empty; gets `latest` and `step_000000000`.
        options: how.
        allow_pickle: read `pytorch_model*.bin` where there are no safetensors, tensors only.

    Raises:
        UserError: the folder is damaged, made up, or of a model that is not computed; or `out_dir`
            is taken.
    """
    refuse_taken(out_dir)
    source = HFSource.open(folder, allow_pickle=allow_pickle)
    weights = WeightSource(
        folder, source.model, source.entries, source.dtype, source.read, _companions(folder, source)
    )
    return write_checkpoint(weights, out_dir, options)


def write_checkpoint(source: WeightSource, out_dir: Path, options: Importing) -> ImportedModel:
    """Write weights as the checkpoint of step 0 of a run that has not begun.

    Raises:
        UserError: `out_dir` is taken, or the dtype is not known.
    """
    dtype = _dtype(source, options.dtype)
    model = source.model
    config = _config(model, _PRECISION[dtype])
    raise_user_errors(list(check_model(config)))
    blocks = [
        block
        for entry in source.entries
        for block in blocks_of(
            entry,
            range(model.num_layers) if entry.is_per_layer else (None,),
            entry.stored_shape(model),
            dtype.itemsize,
        )
    ]
    num_bytes = sum(torch.Size(block.shape).numel() for block in blocks) * dtype.itemsize
    options.on_begin(num_bytes)
    name = checkpoint_name(0)
    task = {"source": str(source.folder.resolve()), "model": model.model_dump(mode="json")}
    with staged(out_dir, task | {"dtype": str(dtype)}, resume=options.resume) as staging:
        (staging.folder / name / STATE).mkdir(parents=True, exist_ok=True)

        def read(block: Block, out: Tensor) -> None:
            source.read(block.entry, block.layer, block.start, out)

        written = write_state(staging, f"{name}/{STATE}", blocks, dtype, read, options.on_bytes)
        files = {f"{STATE}/{file}": record for file, record in written.items()}
        files |= _write_small_files(staging, name, config, source.companions)
        write_marker(staging.folder / name, 0, files)
        fsync_path(staging.folder / name)
        write_text_atomically(staging.folder / LATEST, name + "\n")
    num_parameters = sum(
        torch.Size(shape).numel() * (model.num_layers if entry.is_per_layer else 1)
        for entry in source.entries
        for shape in entry.hf_shapes(model)
    )
    return ImportedModel(
        checkpoint=out_dir / name,
        dtype_name=str(dtype).removeprefix("torch."),
        num_parameters=num_parameters,
        num_bytes=num_bytes,
        has_tokenizer=bool(source.companions),
    )


def _dtype(source: WeightSource, name: str | None) -> torch.dtype:
    if name is None:
        if source.dtype in _PRECISION:
            return source.dtype
        logger.info("%s weights are kept as float32; --dtype bfloat16 rounds them", source.dtype)
        return torch.float32
    if name not in IMPORT_DTYPES:
        raise UserError(f"dtype {name}", "is not known", f"Give one of {', '.join(IMPORT_DTYPES)}.")
    return IMPORT_DTYPES[name]


def _config(model: ModelConfig, precision: str) -> RunConfig:
    """A run of no step with this model: what config.yaml and run_state.json are written from."""
    values: dict[str, Any] = {
        "run": {"name": "imported", "output_dir": "runs/imported"},
        "model": model.model_dump(mode="json"),
        "precision": {"mode": precision},
        "data": {"blend": [], "sequence_length": model.longest_exact_sequence},
        "batch": {"global": 1},
        "optimizer": {"lr": 1e-5},
        "training": {"steps": 1},
    }
    return RunConfig.model_validate(values)


def _write_small_files(
    staging: Staging, name: str, config: RunConfig, companions: Mapping[str, Path]
) -> dict[str, FileRecord]:
    """Everything of the checkpoint but the tensors; a resumed import writes it again."""
    folder = staging.folder / name
    layout = RankLayout.of(config.parallel, 1)
    state = RunState.of(config, layout, step=0, consumed_samples=0, weights_only=True)
    contents = {CONFIG: dump_config(config).encode(), FILE_NAME: state.to_json().encode()}
    if companions:
        (folder / TOKENIZER).mkdir(exist_ok=True)
    for file, path in companions.items():
        contents[f"{TOKENIZER}/{file}"] = path.read_bytes()
    records = {}
    for file, content in contents.items():
        (folder / file).unlink(missing_ok=True)
        records[file] = write_file(folder / file, content)
    return records


def _companions(folder: Path, source: HFSource) -> dict[str, Path]:
    """The tokenizer's files, chat template included, and how to generate; none without tokenizer.

    Raises:
        UserError: the tokenizer is damaged, or has more tokens than the model.
    """
    names = ("tokenizer.json", "tokenizer.model", "tekken.json")
    if not any((folder / name).is_file() for name in names):
        logger.warning("%s holds no tokenizer: imported without", folder)
        return {}
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > source.model.vocab_size:
        raise UserError(
            str(tokenizer.path),
            f"has {tokenizer.vocab_size} tokens, the model only {source.model.vocab_size}",
            "Give the tokenizer that belongs to the weights.",
        )
    found = {path.name: path for path in tokenizer.files}
    generation = folder / GENERATION_CONFIG
    return found | ({generation.name: generation} if generation.is_file() else {})
