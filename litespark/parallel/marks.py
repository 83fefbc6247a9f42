"""Marks that megatron-core reads from parameters, and whose absence gives wrong numbers silently.

* `tensor_model_parallel` on a sharded weight: without it the gradient norm counts rank 0's part
  only.
* `sequence_parallel` on a norm's weight under sequence parallelism: each rank sees a part of the
  sequence, and without the mark the parts of the gradient are not summed.

`check_parameter_marks` finds both before the first step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from litespark.errors import LitesparkError

if TYPE_CHECKING:
    import torch
    from megatron.core.transformer import TransformerConfig


def check_parameter_marks(model: torch.nn.Module, config: TransformerConfig) -> None:
    """Check the marks of every parameter of one model chunk; needs initialised process groups.

    Args:
        model: a module with `sharded_state_dict`, bare or wrapped in Float16Module or DDP.
        config: the configuration the model was built from.

    Raises:
        LitesparkError: naming the first parameter whose mark is missing.
    """
    if config.tensor_model_parallel_size == 1:
        return
    sharded = _tensor_parallel_parameters(model)
    for name, param in model.named_parameters():
        if id(param) in sharded and not getattr(param, "tensor_model_parallel", False):
            raise LitesparkError(
                f"parameter {name} is sharded over {config.tensor_model_parallel_size} tensor"
                " parallel ranks but not marked: the gradient norm would leave parts of it out."
                " Call set_tensor_model_parallel_attributes on it."
            )
    if not config.sequence_parallel:
        return
    for name, param in _norm_parameters(model):
        if id(param) not in sharded and not getattr(param, "sequence_parallel", False):
            raise LitesparkError(
                f"parameter {name} of a norm is not marked under sequence parallelism: its"
                " gradient would cover this rank's part of the sequence only. Set"
                " parameter.sequence_parallel = config.sequence_parallel."
            )


def _norm_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield the parameters of norm modules and of norms fused into another module."""
    for path, module in model.named_modules():
        # Norms inside attention see whole sequences of this rank's heads; megatron-core sums their
        # gradients by name.
        if path.endswith(("q_layernorm", "k_layernorm")):
            continue
        is_norm = "norm" in type(module).__name__.lower()
        for name, param in module.named_parameters(recurse=False):
            if is_norm or "layer_norm" in name:
                yield f"{path}.{name}".lstrip("."), param


def _tensor_parallel_parameters(model: Any) -> set[int]:
    """Return the ids of the parameters of which this rank holds a part."""
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    sharded: set[int] = set()
    for entry in nested_values(model.sharded_state_dict(metadata={"dp_cp_group": group})):
        # A factory splits one parameter, such as the gate and up halves of an MLP, into several
        # entries of one global shape; the parameter itself is its data.
        if isinstance(entry, ShardedTensorFactory):
            pieces = [piece for piece in nested_values(entry.build()) if piece is not None]
        else:
            pieces = [entry]
        for piece in pieces:
            if not isinstance(piece, ShardedTensor):
                continue
            # The leading axes, such as the layer, are not the tensor's own.
            whole = piece.global_shape[piece.prepend_axis_num :]
            if entry.data is not None and tuple(whole) != tuple(entry.data.shape):
                sharded.add(id(entry.data))
    return sharded
