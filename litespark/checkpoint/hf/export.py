"""A checkpoint as a folder that Hugging Face's transformers loads.

The model is not built.  The checkpoint stores whole tensors, whatever layout wrote it, so each is
read by itself, turned by the family's table, converted, and appended to a file.  Memory holds one
tensor of a layer, or one piece of the embedding: a model that took a cluster to train is exported
by one machine without a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from litespark.checkpoint.hf.adapters import open_reader
from litespark.checkpoint.hf.config_json import FILE_NAME as CONFIG_JSON
from litespark.checkpoint.hf.folder import (
    GENERATION_CONFIG,
    generation_config,
    model_card,
    write_json,
    write_manifest,
    write_tokenizer,
)
from litespark.checkpoint.hf.read import CheckpointReader
from litespark.checkpoint.hf.registry import config_json, family_of_model
from litespark.checkpoint.hf.shards import (
    MAX_SHARD_BYTES,
    PlannedFile,
    PlannedTensor,
    plan_files,
    write_file,
    write_index,
)
from litespark.checkpoint.hf.staging import Staging, refuse_taken, staged
from litespark.checkpoint.hf.table import Entry, Rule
from litespark.checkpoint.integrity import MARKER
from litespark.checkpoint.run_state import FILE_NAME, RunState
from litespark.checkpoint.tokenizer import TOKENIZER, find_tokenizer
from litespark.config.schema import ModelConfig
from litespark.data.tokenizers import Tokenizer, load_tokenizer
from litespark.errors import UserError
from litespark.models.transformer_config import DTYPES
from litespark.utils.files import sha256_of_file, write_text_atomically

EXPORT_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
logger = logging.getLogger("litespark.hf")


@dataclass(frozen=True)
class Exporting:
    """How to export.

    Attributes:
        dtype: a name in `EXPORT_DTYPES`; None keeps the checkpoint's format.
        tokenizer: tokenizer to ship; None takes the one of the checkpoint's run, if it is there.
        max_shard_bytes: largest size of one weight file.
        resume: go on with what an export that was cut short has left.
        on_begin: told the size of all weights in bytes.
        on_bytes: told of each part of them that was written.
    """

    dtype: str | None = None
    tokenizer: str | None = None
    max_shard_bytes: int = MAX_SHARD_BYTES
    resume: bool = False
    on_begin: Callable[[int], None] = lambda total: None
    on_bytes: Callable[[int], None] = lambda count: None


@dataclass(frozen=True)
class ExportedModel:
    """What was written: the folder, the format of the weights, and how much of them."""

    folder: Path
    architecture: str
    dtype_name: str
    num_tensors: int
    num_parameters: int
    num_bytes: int
    weight_files: tuple[str, ...]
    has_tokenizer: bool


def export_checkpoint(
    checkpoint: Path, out_dir: Path, options: Exporting = Exporting()
) -> ExportedModel:
    """Write `checkpoint` as a Hugging Face folder; to be called inside `single_process`.

    The folder appears when all of it is on disk.  The tensors are the same, bit for bit, whatever
    layout wrote the checkpoint.

    Args:
        checkpoint: a complete checkpoint (`step_...`).
        out_dir: a folder that does not exist or is empty.
        options: how.

    Raises:
        UserError: `out_dir` is taken, or the checkpoint, the tokenizer or the dtype will not do.
    """
    state = RunState.read(checkpoint)
    model = state.model_config()
    dtype_name = options.dtype or str(DTYPES[state.precision]).removeprefix("torch.")
    if dtype_name not in EXPORT_DTYPES:
        raise UserError(
            f"dtype {dtype_name}", "is not known", f"Give one of {', '.join(EXPORT_DTYPES)}."
        )
    refuse_taken(out_dir)
    reader = open_reader(checkpoint, family_of_model(model), model)
    reader.check()
    shipped = _open_tokenizer(checkpoint, state, options.tokenizer)
    dtype = EXPORT_DTYPES[dtype_name]
    files = plan_files(hf_tensors(reader, model), dtype, options.max_shard_bytes)
    num_parameters = sum(torch.Size(t.shape).numel() for file in files for t in file.tensors)
    options.on_begin(num_parameters * dtype.itemsize)
    task = {
        "checkpoint": str(checkpoint.resolve()),
        "identity": _identity(checkpoint),
        "dtype": dtype_name,
        "max_shard_bytes": options.max_shard_bytes,
    }
    with staged(out_dir, task, resume=options.resume) as staging:
        write_weights(staging, files, dtype, options.on_bytes)
        _write_small_files(staging.folder, state, shipped, dtype_name, num_parameters)
        _describe(staging, state, dtype_name)
    return ExportedModel(
        folder=out_dir,
        architecture=family_of_model(model).architecture,
        dtype_name=dtype_name,
        num_tensors=sum(len(file.tensors) for file in files),
        num_parameters=num_parameters,
        num_bytes=num_parameters * dtype.itemsize,
        weight_files=tuple(file.name for file in files),
        has_tokenizer=shipped is not None,
    )


def hf_tensors(reader: CheckpointReader, model: ModelConfig) -> Iterator[PlannedTensor]:
    """Every tensor of the Hugging Face folder in order, with where its rows come from."""
    last = _LastRead(reader)
    for entry, layer in reader.tensors():
        shapes = entry.hf_shapes(model)
        for part, (name, shape) in enumerate(zip(entry.names(layer), shapes, strict=True)):
            yield PlannedTensor(name, shape, _Blocks(last, model, entry, layer, part))


def write_weights(
    staging: Staging,
    files: list[PlannedFile],
    dtype: torch.dtype,
    on_bytes: Callable[[int], None],
) -> None:
    """Write the files that are not there yet, and the index if there are several.

    Raises:
        UserError: the checkpoint is damaged, or a value does not fit `dtype`.
        OSError: the disk is full.
    """
    for file in files:
        path = staging.folder / file.name
        if file.name in staging.done and path.is_file():
            on_bytes(sum(torch.Size(t.shape).numel() for t in file.tensors) * dtype.itemsize)
            continue
        path.unlink(missing_ok=True)
        digest = write_file(path, file, dtype, on_bytes)
        staging.record(file.name, digest)
    if len(files) > 1:
        write_index(staging.folder, files, dtype)


class _LastRead:
    """Keeps the stored tensor that was read last: q, k and v come from one."""

    def __init__(self, reader: CheckpointReader) -> None:
        self.reader = reader
        self._place: tuple[Entry, int | None] | None = None
        self._value: Tensor | None = None

    def read(self, entry: Entry, layer: int | None) -> Tensor:
        if self._place != (entry, layer) or self._value is None:
            self._value = None  # before the next is read
            self._value, self._place = self.reader.read(entry, layer), (entry, layer)
        return self._value

    def forget(self) -> None:
        self._place = self._value = None


@dataclass(frozen=True)
class _Blocks:
    """The rows of one Hugging Face tensor in order, read when they are asked for."""

    last: _LastRead
    model: ModelConfig
    entry: Entry
    layer: int | None
    part: int

    def __call__(self) -> Iterable[Tensor]:
        runs = [run for run in self.entry.runs(self.model) if run.part == self.part]
        if self.entry.rule is not Rule.VOCABULARY:
            stored = self.last.read(self.entry, self.layer)
            for run in runs:
                yield stored.narrow(0, run.stored_start, run.num_rows)
            return
        # The largest tensors of all: piece by piece.
        self.last.forget()
        reader, (run,) = self.last.reader, runs
        for _, rows in reader.pieces(self.entry, run.num_rows):
            yield rows


def _write_small_files(
    folder: Path,
    state: RunState,
    shipped: Tokenizer | None,
    dtype_name: str,
    num_parameters: int,
) -> None:
    """All but the weights and the manifest; a resumed export writes it again."""
    model, generation = state.model_config(), generation_config(shipped)
    ids = generation.get("bos_token_id"), generation.get("eos_token_id")
    write_json(folder / CONFIG_JSON, config_json(model, dtype_name, *ids))
    write_json(folder / GENERATION_CONFIG, generation)
    if shipped is not None:
        write_tokenizer(folder, shipped, model.max_sequence_length)
    card = model_card(state, num_parameters, dtype_name)
    write_text_atomically(folder / "README.md", card)


def _describe(staging: Staging, state: RunState, dtype_name: str) -> None:
    """The manifest: what was computed while writing is not read again."""
    sums = {
        path.name: staging.done.get(path.name) or sha256_of_file(path)
        for path in staging.folder.iterdir()
        if path.name not in staging.own_files
    }
    files = {name: ((staging.folder / name).stat().st_size, sum_) for name, sum_ in sums.items()}
    write_manifest(
        staging.folder, files, dtype=dtype_name, step=state.step, versions=state.versions
    )


def _identity(checkpoint: Path) -> str:
    """Changes whenever a file of the checkpoint does, as long as it has its list of files."""
    marker = checkpoint / MARKER
    return sha256_of_file(marker if marker.is_file() else checkpoint / FILE_NAME)


def _open_tokenizer(checkpoint: Path, state: RunState, path: str | None) -> Tokenizer | None:
    """The tokenizer that the user names, else that of the run; None, with a warning, if it is gone.

    Raises:
        UserError: the named tokenizer cannot be read, or has more tokens than the model.
    """
    is_named = path is not None
    path = path or find_tokenizer(checkpoint, state.data.get("tokenizer"))
    if path is None:
        logger.warning(
            "the run names no data.tokenizer, and the checkpoint holds no %s: exported without "
            "tokenizer files",
            TOKENIZER,
        )
        return None
    if not is_named and not Path(path).exists():
        logger.warning(
            "%s, the run's tokenizer, is not there (seen from %s): exported without it; "
            "name it with --tokenizer",
            *(path, Path.cwd()),
        )
        return None
    tokenizer = load_tokenizer(path)
    vocab_size = state.model_config().vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"tokenizer {path}",
            f"has {tokenizer.vocab_size} tokens, the model only {vocab_size}",
            "Give the tokenizer that the model was trained with.",
        )
    return tokenizer
