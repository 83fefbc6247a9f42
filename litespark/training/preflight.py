"""Finds what is wrong with a run before it starts, in one process.

The launcher runs these checks before it starts processes, so a mistake costs a second and one
message; every rank runs them again, because on many nodes each sees its own file system.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from litespark.checkpoint.folder import find_checkpoint, newest_first
from litespark.checkpoint.initial_weights import check_initial_weights
from litespark.checkpoint.integrity import first_intact
from litespark.checkpoint.mirror import remote_checkpoints
from litespark.checkpoint.run_state import RunState, check_same_model
from litespark.config.schema import RunConfig
from litespark.config.validate import check_config
from litespark.data.blend import Blend, Part, check_tokenizer, open_blends
from litespark.data.chat_samples import open_chats
from litespark.data.sample_index import IndexCache
from litespark.data.storage import is_remote, require_storage
from litespark.data.tokenizers import load_tokenizer
from litespark.errors import MissingExtraError, UserError


@dataclass(frozen=True)
class Preflight:
    """What the checks found: the data, and the checkpoint to resume from, if any.

    `candidates` are `checkpoint` and those to take, in this order, when its bytes are damaged.
    """

    train: Blend
    validation: Blend | None
    checkpoint: Path | None
    candidates: list[Path]


def preflight(config: RunConfig, world_size: int) -> Preflight:
    """Check the configuration, open the data, choose the checkpoint.

    Raises:
        UserError: anything that would end the run later.
    """
    check_config(config, world_size)
    _check_extras(config)
    if config.checkpoint.mirror is not None or is_remote(config.run.resume):
        require_storage()
    train, validation = open_data(config)
    candidates = checkpoint_candidates(config)
    checkpoint = first_intact(candidates)
    if checkpoint is not None:
        state = RunState.read(checkpoint)
        check_same_model(state, checkpoint, config.model)
        if state.weights_only:
            raise UserError(
                f"run.resume = {config.run.resume}",
                f"{checkpoint} holds weights alone, and no state of a run to go on with",
                f"Set run.init_from={checkpoint} and another run.output_dir.",
            )
    elif config.run.init_from is not None:
        check_initial_weights(config.run.init_from, config.model)
    _check_reference(config, checkpoint)
    _check_output_dir(config)
    return Preflight(train, validation, checkpoint, candidates)


def _check_reference(config: RunConfig, checkpoint: Path | None) -> None:
    """Refuse a run on preferences that would begin with another run's state."""
    is_own = checkpoint is None or _is_own(checkpoint, config)
    if config.task == "dpo" and (is_remote(config.run.resume) or not is_own):
        raise UserError(
            f"run.resume = {config.run.resume}",
            "goes on with another run's state, and says not what the reference is",
            "Set run.init_from to it: its weights are the reference too.",
        )


def checkpoint_candidates(config: RunConfig) -> list[Path]:
    """The checkpoints that `run.resume` allows, the one to be preferred first.

    A checkpoint that was asked for by name has no substitute.

    Raises:
        UserError: `never`, but the folder holds checkpoints; or the path is no checkpoint.
    """
    checkpoints = Path(config.run.output_dir) / "checkpoints"
    own = newest_first(checkpoints)
    if config.run.resume == "auto" or is_remote(config.run.resume):
        return own
    if config.run.resume == "never":
        if own:
            raise UserError(
                "run.resume = never",
                f"run.output_dir already holds {own[0].name}",
                "Set run.resume=auto to go on, or give another run.output_dir.",
            )
        return []
    wanted = find_checkpoint(config.run.resume)
    # Another run's checkpoint is where this run starts; restarted, it goes on from its own.
    return [wanted] if _is_own(wanted, config) or not own else own


def _is_own(checkpoint: Path, config: RunConfig) -> bool:
    checkpoints = Path(config.run.output_dir) / "checkpoints"
    return checkpoint.resolve().parent == checkpoints.resolve()


def remote_candidates(config: RunConfig, local: Sequence[Path]) -> list[str]:
    """Checkpoints in a store that a run begins with when there are no local ones, best first.

    They are those of `run.resume`, if that is in a store, else of the run's own mirror.

    Raises:
        UserError: the store cannot be asked, or holds none, or holds some that must not be there.
    """
    resume, mirror = config.run.resume, config.checkpoint.mirror
    place = resume if is_remote(resume) else mirror
    if place is None or local:
        return []
    found = remote_checkpoints(place)
    if place == resume and not found:
        raise UserError(
            f"run.resume = {resume}",
            "holds no complete checkpoint",
            "Give what was checkpoint.mirror of a run, or one of its step_... folders.",
        )
    if resume == "never" and found:
        raise UserError(
            "run.resume = never",
            f"checkpoint.mirror already holds {found[0]}",
            "Set run.resume=auto to go on from it, or give another checkpoint.mirror.",
        )
    return found


def open_data(config: RunConfig) -> tuple[Blend, Blend | None]:
    """The training and validation parts of the blend; no validation where nothing evaluates.

    Raises:
        UserError: a shard or the tokenizer is missing, damaged, or does not fit the model.
    """
    data, cache = config.data, IndexCache(config.data.index_cache)
    entries = [(entry.prefix, entry.weight) for entry in data.blend]
    identity = path = None
    if data.tokenizer is not None:
        tokenizer = load_tokenizer(data.tokenizer)
        identity, path = tokenizer.identity, str(tokenizer.path)
        if tokenizer.vocab_size > config.model.vocab_size:
            raise UserError(
                f"model.vocab_size = {config.model.vocab_size}",
                f"is smaller than that of the tokenizer {data.tokenizer}, {tokenizer.vocab_size}",
                f"Set model.vocab_size={tokenizer.vocab_size} or more.",
            )
    check_tokenizer(entries, config.model.vocab_size, identity, path)
    evaluates = config.training.eval_every is not None
    parts: tuple[Part, ...] = ("train", "validation") if evaluates else ("train",)
    length, seed = data.sequence_length, config.seed
    train, *rest = (
        open_blends(entries, data.split, parts, length, seed, cache, data.packing == "whole")
        if config.task == "pretrain"
        else open_chats(entries, data.split, parts, length, seed, config.task)
    )
    if train is None:
        raise UserError("data.split", "leaves nothing for training", "Give a training share.")
    return train, rest[0] if evaluates else None


def _check_extras(config: RunConfig) -> None:
    """What the places of metrics need beyond what is always installed."""
    wanted = (
        (config.logging.wandb_project, "wandb", "wandb", "logging.wandb_project"),
        (config.logging.mlflow_experiment, "mlflow", "mlflow", "logging.mlflow_experiment"),
        (
            *(config.metering.prometheus_port, "prometheus_client"),
            *("prometheus", "metering.prometheus_port"),
        ),
    )
    for value, package, extra, key in wanted:
        if value is not None and find_spec(package) is None:
            raise MissingExtraError(package, extra, key)


def _check_output_dir(config: RunConfig) -> None:
    """Whether the folder can be made: tried in its nearest existing parent, and undone."""
    where = f"run.output_dir = {config.run.output_dir}"
    folder = Path(config.run.output_dir).absolute()
    try:
        for name, is_kind in (
            ("checkpoints", Path.is_dir),
            *((name, Path.is_file) for name in ("config.yaml", "metrics.jsonl", "events.jsonl")),
        ):
            if (folder / name).exists() and not is_kind(folder / name):
                raise UserError(where, f"holds a {name} of another kind", "Give another folder.")
        while not folder.exists():
            folder = folder.parent
    except (OSError, ValueError) as error:
        raise UserError(where, f"is no possible name ({error})", "Give another folder.") from None
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".litespark-"):
            pass
    except OSError as error:
        raise UserError(
            where,
            f"{folder} is no folder that can be written to ({error.strerror})",
            "Give another folder.",
        ) from None
