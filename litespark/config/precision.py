"""The configuration of number formats: BF16, and FP8 with its scales and its guard."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from litespark.config.section import Section


class PrecisionConfig(Section):
    """Number formats; master weights, Adam moments and gradient sums are always fp32.

    With `fp8` the products of the layers' linears are in FP8: E4M3, and E5M2 for gradients
    (blockwise: E4M3 for them too).  Everything else, the LM head included, is as with `bf16`.
    The keys after `mode` are for FP8.
    """

    mode: Literal["bf16", "fp32", "fp8"] = Field(
        default="bf16", description="Format of weights and activations."
    )
    recipe: Literal["delayed", "tensorwise", "blockwise"] = Field(
        default="delayed",
        description="Scales: one a tensor, from the largest values of earlier steps (delayed) or "
        "of the tensor itself, also called current (tensorwise); or one for each tile of 128 "
        "(blockwise).",
    )
    primary_weights: Literal["bf16", "fp8"] = Field(
        default="bf16",
        description="What the weights of FP8 linears exist in beside their fp32 masters: bf16, of "
        "which FP8 copies are made once a step; or fp8 alone, which the optimizer writes: 2 bytes "
        "a parameter less memory, and half the bytes for data-parallel ranks to gather. With fp8, "
        "layers that the guard moves to BF16, and its comparisons, have weights rounded to FP8. "
        "Under delayed and tensorwise, with model.backend=triton.",
    )
    amax_history_steps: int = Field(
        default=16, ge=1, description="Optimizer steps that a delayed scale looks back on."
    )
    margin: int = Field(
        default=0,
        ge=0,
        le=16,
        description="Scales of activations and gradients are lowered by 2^margin, which leaves "
        "room above the largest value; those of weights are not. Under delayed and tensorwise; "
        "with model.backend=te under delayed alone, and for weights too.",
    )
    bf16_first_layers: int = Field(
        default=0, ge=0, description="So many layers at the bottom stay in BF16."
    )
    bf16_last_layers: int = Field(
        default=0, ge=0, description="So many layers at the top stay in BF16."
    )
    fc1_output: Literal["bf16", "fp8_kept", "fp8"] | None = Field(
        default=None,
        description="The MLP's widest tensor: in BF16; in BF16, of which an FP8 copy waits for "
        "backward (half of the activations' memory); or written in FP8 by the product and read "
        "so by both directions (fastest; delayed recipe only). null: fp8 under delayed, else "
        "fp8_kept. Blockwise and model.backend=te keep it in BF16.",
    )
    fast_accumulation: Literal["forward", "all"] | None = Field(
        default=None,
        description="Which FP8 products leave partial sums in the tensor cores' short "
        "accumulators: only forward's, or the gradients' too (faster, less exact). null: all "
        "under delayed, where its learning was measured, else forward. Blockwise and "
        "model.backend=te have their own way.",
    )
    guard_every: int | None = Field(
        default=None,
        ge=1,
        description="Steps between comparisons of FP8 with BF16 on one fixed batch; null: never.",
    )
    guard_max_gap: float = Field(
        default=0.01,
        gt=0,
        description="Difference of the two losses, relative to BF16's, from which the guard acts.",
    )
    guard_action: Literal["log", "bf16"] = Field(
        default="log",
        description="What the guard does beyond the gap: only say so, or move the layer whose FP8 "
        "output is farthest off to BF16 for the rest of the run.",
    )
