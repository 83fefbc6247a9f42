"""The reference of preference optimisation: what it says of all answers, once or step by step.

`precomputed` (the default) runs the initial model over each shard once, forward only, at the run's
own layout, and keeps the result beside the shard:

    P_dpo_document_reference/IDENTITY.npy    fp32 [documents], log-probability of each answer
    P_dpo_document_reference/IDENTITY.json   what it is of, and its SHA-256

IDENTITY is a digest of the initial weights' origin, the shape, the number format and the shard's
own digests, so that a file is found again by whatever run has the same reference, and by no other.
Training then holds one model in memory.

`frozen` keeps a second model and asks it in each step, which costs its memory and a forward pass.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core import parallel_state
from megatron.core.transformer.module import Float16Module
from rich.progress import track

from litespark.checkpoint.initial_weights import weights_identity
from litespark.config.schema import RunConfig
from litespark.data.blend import Blend
from litespark.data.chat_samples import ChatCorpus, ChatSample
from litespark.data.chat_shards import ChatShard
from litespark.data.loader import Batch, BatchLoader
from litespark.errors import LitesparkError, UserError
from litespark.models.build import build_chunks
from litespark.models.transformer_config import transformer_config
from litespark.modules.low_rank import enable_adapters, has_trained_adapters
from litespark.objectives.dpo import answers_step
from litespark.parallel.groups import any_rank, gather_objects
from litespark.training.agreement import on_all_ranks
from litespark.training.state import TrainingRun
from litespark.training.step import parameters_synchronised, run_reports
from litespark.utils.files import atomic_write, write_text_atomically

logger = logging.getLogger("litespark.training")

Logps = npt.NDArray[np.float32]
# Of the model, what does not change its initial weights.
_NOT_THE_WEIGHTS = {*("preset", "backend", "attention"), "max_sequence_length"}


def prepare_reference(
    run: TrainingRun,
    train: Blend[Any],
    validation: Blend[Any] | None,
    initial_weights: Callable[[], object] | None = None,
) -> None:
    """Give a run on preferences its reference; all ranks call it together, before the first step.

    Runs on other tasks need none.  `initial_weights` puts the model into the state that the
    reference is; None: it is in it.

    Raises:
        UserError: the initial weights cannot be read.
    """
    if run.config.task != "dpo":
        return
    load = initial_weights or (lambda: None)
    if run.config.dpo.reference == "frozen":
        load()
        has_adapters = run.config.lora is not None
        reference = WithoutAdapters(run) if has_adapters else FrozenReference(run)
        run.attach_reference = reference.attach
        return
    corpora: list[ChatCorpus] = [
        corpus for blend in (train, validation) if blend is not None for corpus in blend.corpora
    ]
    known: dict[str, Logps] = {}
    for corpus in corpora:
        if corpus.prefix not in known:
            known[corpus.prefix] = reference_logps(run, corpus.shard, load)
        corpus.reference_logps = known[corpus.prefix]


def reference_logps(
    run: TrainingRun, shard: ChatShard, initial_weights: Callable[[], object]
) -> Logps:
    """Log-probabilities of a shard's answers under the run's initial weights; fp32 [documents].

    Read where they have been computed before; a collective call.
    """
    identity = on_all_ranks(lambda: reference_identity(run.config, shard))
    paths = [folder / f"{identity['sha256'][:16]}.npy" for folder in _folders(run, shard)]
    found = next((logps for path in paths if (logps := _read(path, identity)) is not None), None)
    if all(gather_objects(found is not None)):
        assert found is not None, "this rank has it, as all have"
        return found
    initial_weights()
    logps = _compute(run, shard)
    if run.process.is_first:
        _write(paths, identity, logps)
    return logps


def reference_identity(config: RunConfig, shard: ChatShard) -> dict[str, Any]:
    """What log-probabilities are of, as JSON, with its own SHA-256."""
    source = config.run.init_from
    described = {
        "weights": {"seed": config.seed} if source is None else weights_identity(source),
        "model": config.model.model_dump(mode="json", exclude=_NOT_THE_WEIGHTS),
        "precision": config.precision.model_dump(mode="json"),
        "shard": shard.identity,
    }
    text = json.dumps(described, sort_keys=True)
    return {**described, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _folders(run: TrainingRun, shard: ChatShard) -> list[Path]:
    """Beside the shard, or, where that cannot be written, in the run's folder."""
    own = Path(f"{shard.prefix}_reference")
    return [own, run.folder / "reference"]


def _read(path: Path, identity: dict[str, Any]) -> Logps | None:
    """The file's values, None if there is no such file or it is not whole."""
    try:
        stored = json.loads(path.with_suffix(".json").read_text("utf-8"))
        content = path.read_bytes()
        if stored != {**identity, "content": hashlib.sha256(content).hexdigest()}:
            return None
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError):
        return None


def _write(paths: Sequence[Path], identity: dict[str, Any], logps: Logps) -> None:
    """Keep the values in the first folder that takes them; without any they are computed again."""
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as file:
                np.save(file, logps, allow_pickle=False)
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            text = json.dumps({**identity, "content": content}, indent=2) + "\n"
            write_text_atomically(path.with_suffix(".json"), text)
            logger.info("reference log-probabilities are kept in %s", path)
            return
        except OSError as error:
            logger.warning("%s cannot be written (%s)", path.parent, error.strerror or error)


class _EachOnce:
    """All packed samples of a corpus in turn, and again from the first to fill the last step."""

    def __init__(self, corpus: ChatCorpus) -> None:
        self.corpus = corpus

    def read(self, index: int) -> ChatSample:
        """Sample `index`."""
        return self.corpus.read_packed(index % self.corpus.samples_per_epoch)


@torch.no_grad()
def _compute(run: TrainingRun, shard: ChatShard) -> Logps:
    config = run.config
    corpus = ChatCorpus(shard, (0, shard.units), config.data.sequence_length, config.seed)
    steps = -(-corpus.samples_per_epoch // config.batch.global_)
    loader = BatchLoader(
        _EachOnce(corpus),
        micro_batch_size=config.batch.micro,
        global_batch_size=config.batch.global_,
        data_parallel_rank=run.layout.coordinates(run.process.rank).data,
        data_parallel_size=run.layout.data,
        document_mask=True,
    )
    if run.process.is_first:
        logger.info("reference: %d answers of %s, once", shard.tokens.documents, shard.prefix)
    started = time.perf_counter()
    mine: list[tuple[npt.NDArray[np.int64], Logps]] = []
    shows = run.process.is_first and sys.stderr.isatty()
    try:
        with parameters_synchronised(run.chunks), run.policy.unrecorded():
            for chunk in run.chunks:
                chunk.eval()
            for _ in track(range(steps), "reference log-probabilities", disable=not shows):
                batches = loader.next_step()
                reports = answer_logps(run, run.chunks, batches)
                mine += [
                    (batch.documents.numpy(), logps.cpu().numpy())
                    for batch, logps in zip(batches, reports, strict=False)
                    if batch.documents is not None
                ]
            for chunk in run.chunks:
                chunk.train()
    finally:
        loader.close()
    logps = np.full(shard.tokens.documents, np.nan, dtype=np.float32)
    for parts in gather_objects(mine if _speaks() else []):
        for documents, values in parts:
            logps[documents] = values
    unknown = int(np.isnan(logps).sum())
    if unknown:
        raise LitesparkError(
            f"{shard.prefix}: the reference gives no log-probability (NaN) to {unknown} of "
            f"{len(logps)} answers"
        )
    if run.process.is_first:
        seconds = time.perf_counter() - started
        tokens = steps * config.tokens_per_step
        logger.info("reference: %.1f s, %.0f tokens/s", seconds, tokens / seconds)
    return logps


def _speaks() -> bool:
    """Of the ranks that share a replica on the last stage, the first tells what all know."""
    return (
        parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_context_parallel_rank() == 0
    )


def answer_logps(
    run: TrainingRun, chunks: Sequence[torch.nn.Module], batches: Sequence[Batch]
) -> list[torch.Tensor]:
    """Each micro-batch's log-probabilities of answers, on the last pipeline stage; else nothing."""
    step = answers_step(run.process.device.device)
    reports = run_reports(run, chunks, step, batches, forward_only=True)
    return [report["logps_n"] for report in reports]


class FrozenReference:
    """A second model with the run's initial weights, asked in each step."""

    def __init__(self, run: TrainingRun) -> None:
        """Copy the run's model, which still has its initial weights."""
        self.run = run
        # A configuration of its own: the run's has the hooks of the training model's gradients.
        core_config = transformer_config(run.config)
        chunks = build_chunks(run.config, core_config)
        self.chunks: list[torch.nn.Module] = []
        for chunk, trained in zip(chunks, run.chunks, strict=True):
            wrapped = Float16Module(core_config, chunk) if core_config.bf16 else chunk
            wrapped.load_state_dict(trained.module.state_dict())
            self.chunks.append(wrapped.eval().requires_grad_(False))

    @torch.no_grad()
    def attach(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """The batches with their answers' log-probabilities."""
        return _with_logps(batches, answer_logps(self.run, self.chunks, batches))


class WithoutAdapters:
    """The run's own model without its adapters, which is what it was, and needs no memory.

    Raises:
        UserError: the adapters are trained already, so that the model without them is another.
    """

    def __init__(self, run: TrainingRun) -> None:
        self.run = run
        if any_rank(any(has_trained_adapters(chunk) for chunk in run.chunks)):
            raise UserError(
                "dpo.reference = frozen with lora",
                f"run.init_from = {run.config.run.init_from} has trained adapters, and the model "
                "without them is not where this run starts",
                "Set dpo.reference=precomputed, or start from its export, which merges them.",
            )

    @torch.no_grad()
    def attach(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """The batches with their answers' log-probabilities."""
        run = self.run
        self._enable(False)
        try:
            with parameters_synchronised(run.chunks), run.policy.unrecorded():
                return _with_logps(batches, answer_logps(run, run.chunks, batches))
        finally:
            self._enable(True)

    def _enable(self, is_enabled: bool) -> None:
        for chunk in self.run.chunks:
            enable_adapters(chunk, is_enabled)
        self.run.policy.weights_changed()


def _with_logps(batches: Sequence[Batch], logps: Sequence[torch.Tensor]) -> Sequence[Batch]:
    """The batches with what the last stage has found; elsewhere as they are."""
    if not logps:
        return batches
    return [
        replace(batch, reference_logps=values) for batch, values in zip(batches, logps, strict=True)
    ]
