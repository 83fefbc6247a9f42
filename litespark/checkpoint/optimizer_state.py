"""The optimizer's state in one form, whatever optimizer, layout and precision wrote or reads it.

Every state of a parameter (fp32 master, both Adam moments) is stored as a tensor of the whole
parameter's shape:

    optimizer.fp32_param.KEY    only where the model's weight KEY is in half precision
    optimizer.exp_avg.KEY
    optimizer.exp_avg_sq.KEY

A weight that the model has in FP8 alone is stored as ever, KEY in BF16, but from the master:
rounded once, and by each rank as much as it owns.

Under the distributed optimizer a rank owns a run of consecutive elements of a parameter, which is
no box in the whole tensor.  It is cut into a few boxes (the rest of a row, whole rows, the start of
a row), and each is a shard of its own: every rank writes and reads just what it owns, and nothing
is gathered.  megatron-core 0.16 has no such format: `fully_reshardable` gathers each rank's state
on all data-parallel ranks (or on the first) and stores other keys than the ordinary optimizers do;
`dp_reshardable` gathers nothing, but loads at other data-parallel degrees only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor

from litespark.fp8.primary import primary_spec

MASTER = "fp32_param"
MOMENTS = ("exp_avg", "exp_avg_sq")
_WEIGHT = "weight"  # of the model, where it is stored from the master


@dataclass(frozen=True)
class _Owned:
    """Elements `start` to `stop` of a parameter, counted in this rank's part of it.

    `is_sole` says that no data-parallel replica has them too.
    """

    parameter: Tensor
    start: int
    stop: int
    states: dict[str, Tensor]
    is_sole: bool


def optimizer_key(state: str, key: str) -> str:
    """Key of a parameter's state in the checkpoint."""
    return f"optimizer.{state}.{key}"


def optimizer_tensors(
    model: dict[str, Any], optimizer: MegatronOptimizer, stored: set[str] | None = None
) -> list[ShardedTensor]:
    """This rank's shards of the optimizer's state; loading fills them in place.

    To save, also the shards of weights that the model has in FP8 alone.

    Args:
        model: the sharded state of the model's chunks, whose entries hold the parameters.
        optimizer: any of megatron-core's that Litespark builds.
        stored: keys of the checkpoint to load: one written in fp32 has no masters of its own, and
            none are read.  None to save.
    """
    pieces = {}
    for entry in nested_values(model):
        if isinstance(entry, (ShardedTensor, ShardedTensorFactory)):
            pieces[entry.data] = _pieces(entry)
    shards = []
    for owned in _owned(optimizer):
        for piece in pieces[owned.parameter]:
            for name, state in owned.states.items():
                shards += _shards(piece, owned, name, state, stored)
            if stored is None and primary_spec(owned.parameter) is not None:
                weight = owned.states[MASTER].to(torch.bfloat16)
                shards += _shards(piece, owned, _WEIGHT, weight, stored)
    return shards


def optimizer_step(optimizer: MegatronOptimizer) -> int:
    """Steps that the Adams of this rank have made."""
    steps = [0]
    for adam in _adams(optimizer):
        steps += [int(group.get("step", 0)) for group in adam.param_groups]
        steps += [int(state["step"]) for state in adam.state.values() if "step" in state]
    return max(steps)


def set_optimizer_step(optimizer: MegatronOptimizer, step: int) -> None:
    """Let the Adams go on after `step`."""
    for adam in _adams(optimizer):
        for group in adam.param_groups:
            if "step" in group or not _counts_in_state(adam):
                group["step"] = step
            for master in group["params"] if _counts_in_state(adam) else ():
                adam.state[master]["step"] = torch.tensor(float(step))


def _counts_in_state(adam: torch.optim.Optimizer) -> bool:
    """torch's Adam counts steps in each parameter's state; other Adams count in the group."""
    return isinstance(adam, (torch.optim.Adam, torch.optim.AdamW))


def boxes(
    shape: Sequence[int], start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Offsets and sizes of the boxes that make up elements `start` to `stop` of a tensor.

    The elements of each box are consecutive, and the boxes come in their order.
    """
    if start >= stop:
        return
    if len(shape) <= 1:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # within one row
        yield from _in_row(shape, last, start, stop)
        return
    yield from _in_row(shape, first - 1, start, first * row)
    if first < last:
        yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])
    yield from _in_row(shape, last, last * row, stop)


def _in_row(
    shape: Sequence[int], row: int, start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    first = row * math.prod(shape[1:])
    for offsets, sizes in boxes(shape[1:], start - first, stop - first):
        yield (row, *offsets), (1, *sizes)


def _shards(
    piece: ShardedTensor, owned: _Owned, name: str, state: Tensor, stored: set[str] | None
) -> Iterator[ShardedTensor]:
    """The part of a state that lies in one piece of its parameter, box by box."""
    assert piece.data is not None, "the model keeps its parameters in its sharded state"
    first = int(piece.data.storage_offset() - owned.parameter.storage_offset())
    start = max(owned.start, first)
    stop = min(owned.stop, first + piece.data.numel())
    key = piece.key if name == _WEIGHT else optimizer_key(name, piece.key)
    if name == MASTER and stored is not None and key not in stored:
        return
    replica = piece.replica_id
    if owned.is_sole and isinstance(replica, tuple):
        replica = (*replica[:-1], 0)  # the last number counts data-parallel replicas
    flat = state.view(-1)
    # An axis that only the stored tensor has (the layers of a model are stored as one): of size 1.
    lead = piece.global_offset[: piece.prepend_axis_num]
    within = piece.global_offset[piece.prepend_axis_num :]
    for offsets, sizes in boxes(piece.local_shape, start - first, stop - first):
        shape = (*[1] * len(lead), *sizes)
        end = start + math.prod(sizes)
        data = flat[start - owned.start : end - owned.start].view(shape)
        start = end
        yield replace(
            piece,
            key=key,
            data=data,
            dtype=data.dtype,
            local_shape=shape,
            global_offset=(*lead, *map(sum, zip(within, offsets, strict=True))),
            axis_fragmentations=None,
            replica_id=replica,
            prepend_axis_num=0,
        )


def _pieces(entry: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    """What an entry stores a parameter as: gate and up of SwiGLU, for one, are two pieces."""
    if isinstance(entry, ShardedTensor):
        return [entry]
    return [each for each in nested_values(entry.build()) if isinstance(each, ShardedTensor)]


def owned_masters(optimizer: MegatronOptimizer) -> Iterator[tuple[Tensor, Tensor, int, int]]:
    """Every parameter that this rank updates a part of, the fp32 master of the part, and which
    elements of this rank's parameter it stands for: from one number to before the other.
    """
    for each in _parts(optimizer):
        yield from _masters(each)


def _parts(optimizer: MegatronOptimizer) -> Iterator[Any]:
    """The optimizers that have parameters."""
    for each in getattr(optimizer, "chained_optimizers", [optimizer]):
        if not getattr(each, "is_stub_optimizer", False):
            yield each


def _adams(optimizer: MegatronOptimizer) -> Iterator[torch.optim.Optimizer]:
    for each in _parts(optimizer):
        yield each.optimizer


def _owned(optimizer: MegatronOptimizer) -> Iterator[_Owned]:
    """Every part of a parameter that this rank updates, with its states."""
    for each in _parts(optimizer):
        is_sole = isinstance(each, DistributedOptimizer)
        for parameter, master, start, stop in _masters(each):
            state = each.optimizer.state[master]
            for moment in MOMENTS:
                if moment not in state:  # it has made no step yet
                    state[moment] = torch.zeros_like(master, dtype=torch.float32).detach()
            if _counts_in_state(each.optimizer):
                state.setdefault("step", torch.tensor(0.0))
            states = {moment: state[moment] for moment in MOMENTS}
            if parameter.dtype != torch.float32:
                states[MASTER] = master
            yield _Owned(parameter, start, stop, states, is_sole)


def _masters(optimizer: Any) -> Iterator[tuple[Tensor, Tensor, int, int]]:
    """Parameter, fp32 master, and which elements of the parameter the master stands for."""
    if isinstance(optimizer, DistributedOptimizer):
        for ranges_by_type in optimizer.gbuf_ranges:
            for buckets in ranges_by_type.values():
                for bucket in buckets:
                    for parameter, ranges in bucket["param_map"].items():
                        group, order = optimizer.model_param_group_index_map[parameter]
                        master = optimizer.optimizer.param_groups[group]["params"][order]
                        yield parameter, master, ranges["param"].start, ranges["param"].end
        return
    if isinstance(optimizer, Float16OptimizerWithFloat16Params):
        for parameters, masters in (
            *zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True),
            *((group, group) for group in optimizer.fp32_from_fp32_groups),
        ):
            for parameter, master in zip(parameters, masters, strict=True):
                yield parameter, master, 0, parameter.numel()
        return
    for group in optimizer.optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter, parameter, 0, parameter.numel()
