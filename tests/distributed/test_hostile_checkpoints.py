"""A checkpoint whose files carry code: refused by name, and the code is not run."""

from __future__ import annotations

import io
import os
import pathlib
import pickle
import re
import shutil

import pytest
import torch

from megatron_patches import apply_patches
from megatron_patches.registry import PATCH_NAMES
from megatron_patches.safe_checkpoint_metadata import UnsafeCheckpointError, load_metadata
from tests.support.spawn import run_distributed

pytestmark = pytest.mark.distributed


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def _state(value):
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

    rank = torch.distributed.get_rank()
    return {
        "tensor": ShardedTensor.from_rank_offsets("tensor", torch.ones(4), replica_id=rank),
        "object": ShardedObject("object", value, (1,), (0,), replica_id=rank),
        "common": 1,
    }


def _attack(rank, world_size, folder, file, safe):
    """Save a checkpoint, spoil one of its files, and return what loading it ends with."""
    from megatron.core import dist_checkpointing

    names = PATCH_NAMES if safe else [n for n in PATCH_NAMES if n != "safe_checkpoint_metadata"]
    apply_patches("cpu", only=names)
    torch.distributed.init_process_group("gloo")
    checkpoint, trace = folder / "checkpoint", folder / "trace"
    if rank == 0:
        checkpoint.mkdir(parents=True)
    torch.distributed.barrier()
    spoilt_entry = file == "entry"
    dist_checkpointing.save(_state(Hostile(trace) if spoilt_entry else {"a": [1]}), checkpoint)
    if rank == 0 and not spoilt_entry and file:
        if file == ".metadata":
            (checkpoint / file).write_bytes(pickle.dumps(Hostile(trace)))
        else:
            torch.save(Hostile(trace), checkpoint / file)
    torch.distributed.barrier()
    try:
        loaded = dist_checkpointing.load(_state(None), checkpoint)
    except BaseException as error:  # torch's CheckpointException is no Exception
        return type(error).__name__, str(error), trace.exists()
    return loaded["tensor"].tolist(), loaded["object"], loaded["common"], trace.exists()


def attack(folder, file, *, safe, world_size=2):
    shutil.rmtree(folder, ignore_errors=True)
    return run_distributed(_attack, world_size, pathlib.Path(folder), file, safe)


def test_a_genuine_checkpoint_loads(tmp_path):
    for answer in attack(tmp_path / "run", "", safe=True):
        assert answer == ([1.0] * 4, {"a": [1]}, 1, False)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (".metadata", r"checkpoint/\.metadata: refers to posix\.mkdir"),
        ("entry", r"checkpoint entry object/shard_0_1: is not plain data"),
        ("common.pt", r"checkpoint/common\.pt: is not plain data"),
    ],
)
def test_a_hostile_file_is_refused_on_every_rank(file, message, tmp_path):
    for kind, text, ran in attack(tmp_path / "run", file, safe=True):
        assert kind == "UnsafeCheckpointError"
        assert re.search(message, text)
        assert not ran


@pytest.mark.parametrize("file", [".metadata", "entry"])
def test_without_the_patch_the_code_runs(file, tmp_path):
    assert attack(tmp_path / "run", file, safe=False, world_size=1)[0][-1] is True


def test_common_state_is_loaded_as_weights_only_by_torch_already(tmp_path):
    kind, text, ran = attack(tmp_path / "run", "common.pt", safe=False, world_size=1)[0]
    assert (kind, ran) == ("UnpicklingError", False)
    assert "Weights only load failed" in text


def test_an_environment_variable_cannot_turn_the_restriction_off(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    apply_patches("cpu", only=["safe_checkpoint_metadata"])
    from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy

    trace = tmp_path / "trace"
    torch.save(Hostile(trace), tmp_path / "common.pt")
    with pytest.raises(UnsafeCheckpointError, match=r"common\.pt: is not plain data"):
        TorchCommonLoadStrategy().load_common(tmp_path)
    assert not trace.exists()


@pytest.mark.parametrize(
    "hostile",
    [
        b"\x80\x04\x8c\x05torch\x8c\x04load\x93.",
        b"\x80\x04\x8c\x05torch\x8c\x0dSize.__base__\x93.",
        b"cbuiltins\neval\n.",
        b"cos\nsystem\n(S'true'\ntR.",
    ],
)
def test_globals_outside_the_list_are_refused(hostile):
    with pytest.raises(UnsafeCheckpointError, match=r"\.metadata: refers to "):
        load_metadata(io.BytesIO(hostile))


def test_the_error_survives_the_way_between_ranks():
    error = pickle.loads(pickle.dumps(UnsafeCheckpointError("a", "b")))  # noqa: S301
    assert str(error) == str(UnsafeCheckpointError("a", "b"))


class ByGetattr:
    """Pickled as Python 3.11.0 to 3.11.3 pickle the member of an enum: getattr(kind, name)."""

    def __init__(self, kind, name):
        self.arguments = (kind, name)

    def __reduce__(self):
        return getattr, self.arguments


def test_members_of_enums_are_read_however_they_were_written():
    from torch.distributed.checkpoint.planner import WriteItemType

    for value in (WriteItemType.TENSOR, ByGetattr(WriteItemType, "TENSOR")):
        assert load_metadata(io.BytesIO(pickle.dumps(value))) is WriteItemType.TENSOR


@pytest.mark.parametrize("name", ["__init__", "__class__", "mro", "NONE"])
def test_getattr_gives_nothing_but_members(name):
    from torch.distributed.checkpoint.metadata import Metadata
    from torch.distributed.checkpoint.planner import WriteItemType

    for kind in (Metadata, WriteItemType):
        with pytest.raises(UnsafeCheckpointError, match=name):
            load_metadata(io.BytesIO(pickle.dumps(ByGetattr(kind, name))))
