"""The weights that a run starts with, when they are not drawn: `run.init_from`.

Only the model is taken over: step, schedule, samples and optimizer begin anew.  What is here runs
before torch is needed; a Hugging Face folder is read in `hf/fill.py`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from litespark.checkpoint.folder import find_checkpoint
from litespark.checkpoint.hf.config_json import FILE_NAME
from litespark.checkpoint.integrity import MARKER
from litespark.checkpoint.run_state import RunState, check_same_model, shape_differences
from litespark.config.schema import ModelConfig
from litespark.errors import raise_user_errors
from litespark.utils.files import sha256_of_file

_SAMPLED_BYTES = 1 << 20


def is_hf_folder(path: str | Path) -> bool:
    """Whether a path is a Hugging Face folder; else it is, or should be, a checkpoint."""
    return (Path(path) / FILE_NAME).is_file()


def check_initial_weights(path: str, model: ModelConfig) -> None:
    """Find what is wrong with `run.init_from`, in seconds: no weights are read.

    Raises:
        UserError: it is neither, is damaged, or is of another model; every key is named.
    """
    if not is_hf_folder(path):
        checkpoint = find_checkpoint(path)
        check_same_model(RunState.read(checkpoint), checkpoint, model)
        return
    # These need torch, and most runs do not start from such a folder.
    from litespark.checkpoint.hf.registry import read_model
    from litespark.checkpoint.hf.source import HFSource

    raise_user_errors(
        shape_differences(
            model,
            read_model(Path(path)),
            f"run.init_from = {path} is a model with",
            "Set it to that value.",
        )
    )
    HFSource.open(Path(path))


def weights_identity(path: str) -> dict[str, str]:
    """A digest of what `run.init_from` names, which tells other weights apart.

    Of a checkpoint that of its checksums; of a Hugging Face folder that of its configuration and of
    each weight file's name, size, first and last MiB.
    """
    if not is_hf_folder(path):
        return {"checkpoint": sha256_of_file(find_checkpoint(path) / MARKER)}
    digest = hashlib.sha256((Path(path) / FILE_NAME).read_bytes())
    for file in sorted(Path(path).glob("*.safetensors")):
        size_bytes = file.stat().st_size
        digest.update(f"{file.name} {size_bytes}".encode())
        with open(file, "rb") as content:
            digest.update(content.read(_SAMPLED_BYTES))
            content.seek(max(0, size_bytes - _SAMPLED_BYTES))
            digest.update(content.read())
    return {"hugging_face": digest.hexdigest()}
