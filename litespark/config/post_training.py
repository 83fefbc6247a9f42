"""What post-training is asked for: preferences (`task: dpo`) and low-rank adapters (`lora`)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from litespark.config.section import Section

Task = Literal["pretrain", "sft", "dpo"]
LoraTarget = Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
LORA_TARGETS: tuple[LoraTarget, ...] = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


class DpoConfig(Section):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290)."""

    beta: float = Field(
        default=0.1,
        gt=0,
        description="How strongly the policy is held to the reference; the margin of loss ipo is "
        "1 / (2 beta).",
    )
    loss: Literal["sigmoid", "ipo"] = Field(
        default="sigmoid",
        description="sigmoid: the logistic loss of DPO; ipo: the squared distance to a fixed "
        "margin (Azar et al. 2023, arXiv 2310.12036).",
    )
    label_smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=0.5,
        description="Probability that a pair's label is wrong (conservative DPO); loss sigmoid "
        "only.",
    )
    length_normalised: bool = Field(
        default=False,
        description="Compare log-probabilities per token of the answer and not of whole answers.",
    )
    reference: Literal["precomputed", "frozen"] = Field(
        default="precomputed",
        description="precomputed: the reference's log-probabilities are computed once, before the "
        "first step, and kept beside the shards; frozen: in each step, by a second model in "
        "memory (with lora: by the model without its adapters).",
    )


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): W + alpha / rank * B A, W frozen."""

    rank: int = Field(default=16, ge=1, description="Rows of A, columns of B.")
    alpha: float = Field(default=32.0, gt=0, description="The product is scaled by alpha / rank.")
    targets: tuple[LoraTarget, ...] = Field(
        default=LORA_TARGETS,
        strict=False,
        min_length=1,
        description="Linears with an adapter, in Megatron's words: linear_qkv, linear_proj, "
        "linear_fc1, linear_fc2.",
    )

    @property
    def scale(self) -> float:
        """What the product of the two matrices is multiplied by."""
        return self.alpha / self.rank
