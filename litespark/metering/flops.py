"""FLOPs of one training token, counted once for the whole project.

A matrix with N parameters costs 2·N FLOPs a token in the forward pass (a multiply and an add) and
twice that in the backward pass (one product for the input's gradient, one for the weight's): 6·N.
Only parameters that are multiplied count: the LM head does, the embedding look-up and the norms do
not.

Attention adds the products that hold no parameters, Q·Kᵀ and P·V.  With h = heads × head size, each
costs 2·h·s FLOPs a token and layer when every position sees all s positions: 4·h·s forward, 12·h·s
with the backward pass.  A causal mask needs half of it, 6·h·s.  We report both:

* causal: the work that must be done, and the basis of MFU;
* full: the convention of nanotron and of many reports, for comparison with them.

Recomputed activations are work done twice for the same result and never count.
"""

from __future__ import annotations

from typing import Protocol

_FLOPS_PER_MATRIX_PARAMETER = 6  # 2 forward, 4 backward
_FULL_ATTENTION_FLOPS = 12  # per layer, h and position: 4 forward, 8 backward
_SWIGLU_MATRICES = 3  # gate, up, down


class TransformerShape(Protocol):
    """The sizes that decide the FLOPs of a Llama; `litespark.config.ModelConfig` has them all."""

    @property
    def num_layers(self) -> int:
        """Transformer layers."""
        ...

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        ...

    @property
    def ffn_hidden_size(self) -> int:
        """Width of SwiGLU's gate and of its up branch."""
        ...

    @property
    def num_attention_heads(self) -> int:
        """Query heads."""
        ...

    @property
    def num_query_groups(self) -> int:
        """Key/value heads."""
        ...

    @property
    def head_dim(self) -> int:
        """Size of one head."""
        ...

    @property
    def vocab_size(self) -> int:
        """Token ids, padding left out."""
        ...


def _parameters_of_layers(shape: TransformerShape) -> int:
    """Matrix parameters of all layers: QKV, output projection, gate, up, down."""
    query_size = shape.num_attention_heads * shape.head_dim
    key_value_size = shape.num_query_groups * shape.head_dim
    attention = (
        shape.hidden_size * (query_size + 2 * key_value_size) + query_size * shape.hidden_size
    )
    mlp = _SWIGLU_MATRICES * shape.hidden_size * shape.ffn_hidden_size
    return shape.num_layers * (attention + mlp)


def matrix_parameters(shape: TransformerShape) -> int:
    """Parameters that every token is multiplied with: those of the layers and of the LM head.

    The LM head counts whether or not it shares the embedding's weight; the embedding look-up, which
    multiplies nothing, does not.
    """
    return _parameters_of_layers(shape) + shape.vocab_size * shape.hidden_size


def total_parameters(
    shape: TransformerShape, tie_embeddings: bool, qkv_bias: bool = False, qk_norm: bool = False
) -> int:
    """All parameters: matrices, embedding (once when tied to the LM head), norms, biases."""
    norms = (2 * shape.num_layers + 1) * shape.hidden_size
    embeddings = (1 if tie_embeddings else 2) * shape.vocab_size * shape.hidden_size
    qkv_size = (shape.num_attention_heads + 2 * shape.num_query_groups) * shape.head_dim
    of_a_layer = qkv_bias * qkv_size + qk_norm * 2 * shape.head_dim
    return _parameters_of_layers(shape) + embeddings + norms + shape.num_layers * of_a_layer


def flops_per_token(shape: TransformerShape, sequence_length: float, causal: bool) -> float:
    """FLOPs of forward and backward for one token of a sequence of `sequence_length` tokens.

    Args:
        shape: sizes of the model.
        sequence_length: tokens that attend to each other: the sample's; with document masks, the
            mean over all tokens of the length of the document that they are in.
        causal: count half of the attention (the work needed) or all of it (the older convention).
    """
    attention_size = shape.num_attention_heads * shape.head_dim
    full_attention = _FULL_ATTENTION_FLOPS * shape.num_layers * attention_size * sequence_length
    attention = full_attention / 2 if causal else full_attention
    return _FLOPS_PER_MATRIX_PARAMETER * matrix_parameters(shape) + attention


def tflops(tokens_per_second: float, flops_per_token: float) -> float:
    """The useful work that a rate of tokens stands for, in TFLOP/s."""
    return tokens_per_second * flops_per_token / 1e12


def mfu(tflops_per_gpu: float, peak_tflops: float | None) -> float | None:
    """Model FLOPs utilisation as a share of 1; None when the peak is not known.

    By the project's convention `tflops_per_gpu` counts causal attention and the peak is the GPU's
    dense BF16 peak, whatever the precision of the run.

    Raises:
        ValueError: when the peak is not positive.
    """
    if peak_tflops is None:
        return None
    if peak_tflops <= 0:
        raise ValueError(f"peak_tflops = {peak_tflops}: must be positive")
    return tflops_per_gpu / peak_tflops
