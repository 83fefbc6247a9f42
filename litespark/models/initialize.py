"""Initial weights that do not depend on the layout.

Each parameter is drawn whole from a generator named after it, and a rank keeps its part.  The same
seed therefore gives the same model on one process and on 512, which is what the tests of every
layout rest on.  The cost is drawing numbers that are thrown away: at 70 B parameters a few seconds
on a GPU, once per run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from megatron.core import parallel_state
from torch import Tensor

from litespark.errors import LitesparkError
from litespark.models.gpt import GPT
from litespark.modules.low_rank import A_NAME, B_NAME
from litespark.parallel.rng import named_generator


def initialize_weights(chunks: Sequence[GPT], seed: int) -> None:
    """Fill every parameter of this rank's chunks in place.

    Norm weights are 1, biases 0; matrices are normal with `init_method_std`, divided by
    sqrt(2 layers) for the two projections that write into the residual stream (GPT-2, section 2.3).

    Raises:
        LitesparkError: a parameter whose rule is unknown.
    """
    for chunk in chunks:
        for name, parameter in named_parameters_globally(chunk):
            with torch.no_grad():
                _fill(chunk, name, parameter, seed)


def named_parameters_globally(chunk: GPT) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters with names that count layers over the whole model, from 0."""
    layers = chunk.decoder.layers
    for name, parameter in chunk.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            layer_number = int(layers[int(parts[2])].layer_number)  # type: ignore[arg-type]
            parts[2] = str(layer_number - 1)  # megatron-core counts from 1
        yield ".".join(parts), parameter


def _fill(chunk: GPT, name: str, parameter: torch.nn.Parameter, seed: int) -> None:
    config = chunk.config
    if name.endswith(("norm.weight", "layer_norm_weight")) and parameter.dim() == 1:
        parameter.fill_(1.0)
        return
    if name.endswith("linear_qkv.bias"):
        parameter.zero_()
        return
    if parameter.dim() != 2:
        raise LitesparkError(f"no rule for the initial value of {name} {tuple(parameter.shape)}")
    if name.endswith(B_NAME):  # the adapter adds nothing at the start
        parameter.zero_()
        return
    std = config.init_method_std
    if name.endswith(A_NAME):
        # The variance of torch's own linear, which PEFT gives A: 1 / (3 k).
        is_split = getattr(parameter, "tensor_model_parallel", False)
        ranks = parallel_state.get_tensor_model_parallel_world_size() if is_split else 1
        std = 1 / math.sqrt(3 * parameter.size(1) * ranks)
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        std /= math.sqrt(2 * config.num_layers)
    if chunk.share_embeddings_and_output_weights and name == "output_layer.weight":
        name = "embedding.word_embeddings.weight"  # the last stage's copy of a tied embedding
    whole = _draw(name, parameter, std, seed)
    parameter.copy_(_local_part(whole, parameter))


def _draw(name: str, parameter: torch.nn.Parameter, std: float, seed: int) -> Tensor:
    """The unsharded parameter, normal with mean 0; fp32."""
    shape = list(parameter.shape)
    if getattr(parameter, "tensor_model_parallel", False):
        shape[parameter.partition_dim] *= parallel_state.get_tensor_model_parallel_world_size()  # type: ignore[attr-defined]
    generator = named_generator(seed, name, parameter.device)
    return torch.empty(shape, device=parameter.device).normal_(0.0, std, generator=generator)


def _local_part(whole: Tensor, parameter: torch.nn.Parameter) -> Tensor:
    """What this tensor-parallel rank keeps; a stride of 2 is [gate | up], split each by itself."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return whole
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    dim: int = parameter.partition_dim  # type: ignore[attr-defined]
    blocks = whole.chunk(parameter.partition_stride, dim=dim)  # type: ignore[attr-defined]
    return torch.cat([block.chunk(size, dim=dim)[rank] for block in blocks], dim=dim)
