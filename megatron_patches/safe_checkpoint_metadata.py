"""Reading a checkpoint must not run code that the checkpoint brings along.

Without: a checkpoint directory from a stranger runs any code on load.
`torch.distributed.checkpoint.filesystem.FileSystemReader.read_metadata` reads `.metadata` with a
plain `pickle.load`, and `DefaultLoadPlanner.load_bytes` reads the non-tensor entries,
megatron-core's sharded objects, with `torch.load(weights_only=False)`.  `common.pt`
(`dist_checkpointing/strategies/common.py`) is safe only as long as no environment variable turns
torch's `weights_only` default off.

The metadata is read by an unpickler that knows the classes of a genuine `.metadata` and nothing
else, everything besides with an explicit `weights_only=True`.  What is refused raises an
`UnsafeCheckpointError`; torch gathers the errors of all ranks in a `CheckpointException`, from
which `TorchDistLoadShardedStrategy.load` gets it back.

Goes when: torch reads both of its files with restricted unpicklers.
"""

from __future__ import annotations

import enum
import functools
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from litespark.errors import UserError
from megatron_patches.attributes import ModuleView, Undo, replace_attributes
from megatron_patches.registry import Condition, Patch

if TYPE_CHECKING:
    import io

    from torch.distributed.checkpoint.planner import ReadItem

# The checkpoint's id in StorageMeta is a path; which class depends on Python and the platform.
_PATHS = {
    (module, name)
    for module in ("pathlib", "pathlib._local")
    for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
}
ALLOWED_GLOBALS = frozenset(
    {
        *(
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorProperties",
                "TensorStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            )
        ),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
        # megatron-core keeps the plans of all ranks, to reuse the metadata in the next save.
        *(
            ("torch.distributed.checkpoint.planner", name)
            for name in (
                "BytesIOWriteData",
                "SavePlan",
                "TensorWriteData",
                "WriteItem",
                "WriteItemType",
            )
        ),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
        *_PATHS,
    }
)


class UnsafeCheckpointError(UserError):
    """A file of a checkpoint holds more than data; nothing of it has been run."""

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(
            where, problem, "The file is damaged or made to run code: do not load this checkpoint."
        )

    def __reduce__(self) -> tuple[type[UnsafeCheckpointError], tuple[str, str]]:
        # torch.distributed.checkpoint sends errors from rank to rank.
        return type(self), (self.where, self.problem)


class _MetadataUnpickler(pickle.Unpickler):
    """Finds the classes of a genuine `.metadata` and refuses every other."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self._file_name = str(getattr(file, "name", ".metadata"))

    def find_class(self, module: str, name: str) -> Any:
        import torch

        if (module, name) in ALLOWED_GLOBALS:
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return self._enum_member
        # A dtype is pickled as a global of torch, such as `torch.float32`.
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise UnsafeCheckpointError(
            self._file_name, f"refers to {module}.{name}, which no checkpoint metadata needs"
        )

    def _enum_member(self, kind: object, name: object) -> enum.Enum:
        """In place of `getattr`, by which Python 3.11.0 to 3.11.3 pickle the members of an enum."""
        if isinstance(kind, enum.EnumMeta) and isinstance(name, str) and name in kind.__members__:
            member: Any = kind.__members__[name]
            return member
        raise UnsafeCheckpointError(
            self._file_name, f"asks for {name!r} of {kind!r}, which is no member of an enum"
        )


def load_metadata(file: IO[bytes]) -> Any:
    """Read a pickled `.metadata` from an open file.

    Raises:
        UnsafeCheckpointError: when it refers to anything but the classes metadata consists of.
    """
    return _MetadataUnpickler(file).load()


def _refusal_in(error: BaseException) -> UnsafeCheckpointError | None:
    """Find what a file was refused for in the error that torch made of it."""
    for failure in getattr(error, "failures", {}).values():
        if isinstance(failure[0], UnsafeCheckpointError):
            return failure[0]
    return None


@contextmanager
def _refusing(where: str) -> Iterator[None]:
    try:
        yield
    except pickle.UnpicklingError as error:
        raise UnsafeCheckpointError(where, f"is not plain data ({error})") from error


def _apply() -> Undo:
    import torch
    from megatron.core.dist_checkpointing.strategies import common
    from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
    from torch.distributed.checkpoint import default_planner, filesystem
    from torch.distributed.checkpoint.api import CheckpointException

    def load_weights_only(file: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("weights_only", None)
        return torch.load(file, *args, weights_only=True, **kwargs)

    # torch turns what read_metadata raises into text, so the last refusal is kept here.
    refused: list[UnsafeCheckpointError] = []

    def load_metadata_once(file: IO[bytes]) -> Any:
        refused.clear()
        try:
            return load_metadata(file)
        except UnsafeCheckpointError as error:
            refused.append(error)
            raise

    planner = default_planner.DefaultLoadPlanner
    strategy = torch_strategy.TorchDistLoadShardedStrategy
    common_strategy = common.TorchCommonLoadStrategy
    original_load_bytes, original_load = planner.load_bytes, strategy.load
    original_load_common = common_strategy.load_common

    @functools.wraps(original_load_bytes)
    def load_bytes(self: Any, read_item: ReadItem, value: io.BytesIO) -> None:
        with _refusing(f"checkpoint entry {read_item.dest_index.fqn}"):
            original_load_bytes(self, read_item, value)

    @functools.wraps(original_load)
    def load(self: Any, *args: Any, **kwargs: Any) -> Any:
        refused.clear()
        try:
            return original_load(self, *args, **kwargs)
        except CheckpointException as error:
            refusal = refused[0] if refused else _refusal_in(error)
            if refusal is None:
                raise
            raise refusal from error

    @functools.wraps(original_load_common)
    def load_common(self: Any, checkpoint_dir: str | Path) -> Any:
        with _refusing(str(Path(checkpoint_dir) / common.COMMON_STATE_FNAME)):
            return original_load_common(self, checkpoint_dir)

    weights_only_torch = ModuleView(torch, load=load_weights_only)
    return replace_attributes(
        (filesystem, "pickle", ModuleView(pickle, load=load_metadata_once)),
        (default_planner, "torch", weights_only_torch),
        (common, "torch", weights_only_torch),
        (planner, "load_bytes", load_bytes),
        (strategy, "load", load),
        (common_strategy, "load_common", load_common),
    )


_TORCH = "torch.distributed.checkpoint"
_MCORE = "megatron.core.dist_checkpointing.strategies"
PATCH = Patch(
    name="safe_checkpoint_metadata",
    symbols=(
        f"{_TORCH}.filesystem.FileSystemReader.read_metadata",
        f"{_TORCH}.filesystem.pickle",
        f"{_TORCH}.default_planner.DefaultLoadPlanner.load_bytes",
        f"{_TORCH}.default_planner.torch",
        f"{_MCORE}.common.torch",
        f"{_MCORE}.common.TorchCommonLoadStrategy.load_common",
        f"{_MCORE}.torch.TorchDistLoadShardedStrategy.load",
    ),
    versions=">=0.16.1,<0.17",
    condition=Condition.ALWAYS,
    why="loading a checkpoint would unpickle, and so run, anything its files contain",
    remove_when="torch reads metadata and byte entries with restricted unpicklers",
    apply=_apply,
)
