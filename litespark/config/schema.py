"""What a run's YAML may say: every section, every key, its type, its unit and its default.

All sections are frozen and refuse unknown keys, so a misspelt key is an error and never ignored.
Types are strict: `tensor: "2"` or `tensor: true` is an error, not a guess.  Checks that need more
than one section stand in `validate.py`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from litespark.config.blends import expand_blend
from litespark.config.post_training import DpoConfig, LoraConfig, Task
from litespark.config.precision import PrecisionConfig
from litespark.config.presets import PRESETS
from litespark.config.resilience import ResilienceConfig
from litespark.config.section import Section


class RopeScalingConfig(Section):
    """Llama 3's scaling of the rotary frequencies for long sequences (Llama 3.1 `rope_scaling`)."""

    factor: float = Field(gt=0, description="How much longer the sequences become.")
    low_freq_factor: float = Field(
        default=1.0,
        gt=0,
        description="Wavelengths above original length / this are scaled by 1/factor.",
    )
    high_freq_factor: float = Field(
        default=4.0, gt=0, description="Wavelengths below original length / this are left alone."
    )
    original_max_sequence_length: int = Field(
        default=8192, ge=1, description="Sequence length of the unscaled model, in tokens."
    )


class ModelConfig(Section):
    """The shape of a Llama: RMSNorm, grouped-query attention with RoPE, SwiGLU, no biases."""

    preset: str | None = Field(
        default=None, description="A known shape; the keys beside it override single values of it."
    )
    num_layers: int = Field(ge=1, description="Transformer layers.")
    hidden_size: int = Field(ge=1, description="Width of the residual stream.")
    ffn_hidden_size: int = Field(ge=1, description="Width of SwiGLU's gate and of its up branch.")
    num_attention_heads: int = Field(ge=1, description="Query heads.")
    num_query_groups: int = Field(
        ge=1, description="Key/value heads (GQA); default: as many as query heads (MHA)."
    )
    head_dim: int = Field(
        ge=2, description="Size of one head; default: hidden_size / num_attention_heads."
    )
    vocab_size: int = Field(ge=1, description="Token ids of the model; at least the tokenizer's.")
    vocab_padding_multiple: int = Field(
        default=128,
        ge=1,
        description="Embedding and LM head rows are padded to a multiple of this, which every "
        "tensor-parallel size must divide; padding never takes probability and is not exported.",
    )
    max_sequence_length: int = Field(ge=1, description="Longest sequence, in tokens.")
    norm_epsilon: float = Field(
        default=1e-5, gt=0, description="Epsilon inside RMSNorm's square root."
    )
    rope_theta: float = Field(default=10000.0, gt=0, description="Base of the rotary frequencies.")
    rope_scaling: RopeScalingConfig | None = Field(
        default=None, description="Llama 3's scaling, or none."
    )
    tie_embeddings: bool = Field(
        default=False, description="LM head shares the embedding's weight."
    )
    init_std: float = Field(
        default=0.02,
        gt=0,
        description="Standard deviation of the initial weights; the projections that write into "
        "the residual stream use init_std / sqrt(2 num_layers).",
    )
    backend: Literal["auto", "reference", "triton", "te"] = Field(
        default="auto",
        description="Who computes the layers: `reference` is plain torch on any device; `triton` "
        "is Litespark's fused blocks; `te` is Transformer Engine; `auto` takes the fastest that "
        "this machine and configuration can run.",
    )
    attention: Literal[
        "auto",
        "flash-cute",
        "flash3",
        "flash2",
        "cudnn",
        "sdpa-flash",
        "sdpa-efficient",
        "sdpa-math",
    ] = Field(
        default="auto",
        description="Library of the core attention of backend `triton`: FlashAttention 4 (CuTe), 3 "
        "or 2, cuDNN, or one of torch's kernels; `auto` measures those that are there at the first "
        "step and takes the fastest.",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        preset = values.get("preset")
        if preset is not None and (not isinstance(preset, str) or preset not in PRESETS):
            raise PydanticCustomError(
                "unknown_preset", "{preset}", {"preset": str(preset), "known": list(PRESETS)}
            )
        filled: dict[str, Any] = {**(PRESETS[preset] if preset else {}), **values}
        heads, hidden = filled.get("num_attention_heads"), filled.get("hidden_size")
        if filled.get("num_query_groups") is None and heads is not None:
            filled["num_query_groups"] = heads
        if filled.get("head_dim") is None and type(hidden) is int and type(heads) is int and heads:
            filled["head_dim"] = hidden // heads
        return filled

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of the LM head, padding included."""
        multiple = self.vocab_padding_multiple
        return -(-self.vocab_size // multiple) * multiple


class ParallelConfig(Section):
    """How the model and the batch are split; data parallelism is what remains of the processes."""

    tensor: int = Field(default=1, ge=1, description="Tensor-parallel size (TP).")
    pipeline: int = Field(default=1, ge=1, description="Pipeline stages (PP).")
    virtual_pipeline: int = Field(
        default=1,
        ge=1,
        description="Model chunks per pipeline rank; above 1 the schedule is interleaved.",
    )
    context: int = Field(
        default=1, ge=1, description="Context-parallel size (CP): splits the sequence."
    )
    sequence: bool = Field(
        default=False,
        description="Sequence parallelism: norms and residuals hold 1/TP of the sequence.",
    )
    distributed_optimizer: bool = Field(
        default=True, description="Optimizer state is split over the data-parallel ranks (ZeRO-1)."
    )
    overlap_grad_reduce: bool = Field(
        default=False, description="Gradients are reduced over data-parallel ranks during backward."
    )
    overlap_param_gather: bool = Field(
        default=False,
        description="Parameters are gathered during forward; needs the distributed optimizer",
    )


class BlendEntry(Section):
    """One corpus of the blend."""

    prefix: str = Field(
        description="Path of a shard without .bin/.idx, e.g. data/wiki_text_document"
    )
    weight: float = Field(
        default=1.0, gt=0, description="Share of the samples, relative to the others."
    )


class DataConfig(Section):
    """Where the tokens come from."""

    blend: tuple[BlendEntry, ...] = Field(
        strict=False,
        description="Corpora and their weights, a list of {prefix, weight}; or {preset: "
        "slimpajama, prefix: P}: that mix of the shards P_<sub-source>_text_document.",
    )
    split: tuple[float, float, float] = Field(
        default=(99.0, 1.0, 0.0),
        strict=False,
        description="Shares of the documents for training, validation and test, in stored order.",
    )
    sequence_length: int = Field(ge=1, description="Tokens in one training sample.")
    document_mask: bool = Field(
        default=False,
        description="Tokens see their own document only: attention, rotary positions (from 0 on) "
        "and loss (the last token of a document predicts nothing) end where a document ends. "
        "What Megatron-LM's --reset-attention-mask, --reset-position-ids and --eod-mask-loss do "
        "together, but at the ends that the shard's index knows and not at a token id. Also for "
        "validation; generating and exporting know no documents.",
    )
    packing: Literal["stream", "whole"] = Field(
        default="stream",
        description="How documents become samples: `stream` joins them and cuts every "
        "sequence_length tokens; `whole` fills samples with whole documents by best-fit "
        "decreasing, and cuts only those longer than a sample. `whole` needs document_mask.",
    )
    tokenizer: str | None = Field(
        default=None,
        description="Tokenizer folder or file; copied into exports, used by `generate`.",
    )
    index_cache: str | None = Field(
        default=None,
        description="Folder of the sample indices; null: `<prefix>_index` beside each shard or, "
        "where that cannot be written, litespark/index in $XDG_CACHE_HOME or ~/.cache.",
    )

    @field_validator("blend", mode="before")
    @classmethod
    def _expand_preset(cls, value: Any) -> Any:
        return expand_blend(value) if isinstance(value, dict) else value


class BatchConfig(Section):
    """How many samples make one optimizer step."""

    micro: int = Field(
        default=1, ge=1, description="Samples of one forward pass on one data-parallel rank"
    )
    global_: int = Field(alias="global", ge=1, description="Samples of one optimizer step.")


class OptimizerConfig(Section):
    """AdamW with decoupled weight decay (none on norms) and clipping of the global norm."""

    lr: float = Field(gt=0, description="Peak learning rate.")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="Decay of the first moment.")
    beta2: float = Field(default=0.95, ge=0, lt=1, description="Decay of the second moment.")
    epsilon: float = Field(
        default=1e-8, gt=0, description="Added to the root of the second moment."
    )
    weight_decay: float = Field(
        default=0.1, ge=0, description="Decoupled weight decay of matrices."
    )
    clip_grad: float = Field(
        default=1.0, ge=0, description="Global gradient norm to clip at; 0: never."
    )


class ScheduleConfig(Section):
    """The learning rate over the steps."""

    kind: Literal["cosine", "wsd", "linear", "constant"] = Field(
        default="cosine",
        description="After warm-up: cosine or linear down to min_lr; wsd: constant, then linear "
        "down over the last decay_steps; constant: stays.",
    )
    warmup_steps: int = Field(default=0, ge=0, description="Steps of linear warm-up from 0.")
    decay_steps: int | None = Field(
        default=None,
        ge=1,
        description="cosine, linear: steps from 0 to the end of the decay (default: all steps). "
        "wsd: steps of the final decay (default: a tenth of all steps).",
    )
    min_lr: float = Field(default=0.0, ge=0, description="Learning rate at the end of the decay.")


class TrainingConfig(Section):
    """How long to train and how often to look; intervals are in optimizer steps."""

    steps: int | None = Field(default=None, ge=1, description="Optimizer steps; or give `tokens`.")
    tokens: int | None = Field(
        default=None, ge=1, description="Training tokens, rounded up to whole steps"
    )
    log_every: int = Field(default=1, ge=1, description="Steps between two lines of metrics.")
    eval_every: int | None = Field(
        default=None, ge=1, description="Steps between evaluations; null: never"
    )
    eval_steps: int = Field(default=10, ge=1, description="Global batches of one evaluation.")
    save_every: int | None = Field(
        default=None, ge=1, description="Steps between checkpoints; the last step is always saved."
    )
    recompute: Literal["none", "selective", "full"] = Field(
        default="none",
        description="Activation checkpointing: recompute the core attention (selective) or whole "
        "layers (full) in backward.",
    )


class CheckpointConfig(Section):
    """What is kept of the run's states."""

    keep_last: int | None = Field(
        default=None, ge=1, description="Newest checkpoints to keep; null: all."
    )
    keep_every: int | None = Field(
        default=None,
        ge=1,
        description="Beside the newest, keep those whose step is a multiple of this; in steps.",
    )
    mirror: str | None = Field(
        default=None,
        description="s3://bucket/name: every checkpoint is also copied there in the background, "
        "kept by the same rules, and fetched when output_dir holds none; needs the extra "
        "litespark[s3].",
    )
    asynchronous: bool = Field(
        default=True,
        description="Write in the background; training waits for the copy to host memory only.",
    )
    verify: bool = Field(
        default=True,
        description="Compare every file with its checksum before it is loaded; a damaged "
        "checkpoint is named and the newest whole one is taken.",
    )


class LoggingConfig(Section):
    """Where metrics go beside `metrics.jsonl` and the console."""

    tensorboard: bool = Field(
        default=True, description="Write event files to <output_dir>/tensorboard."
    )
    wandb_project: str | None = Field(
        default=None, description="Weights & Biases project; needs the extra litespark[wandb]."
    )


class RunSection(Section):
    """Name and place of the run."""

    name: str = Field(default="run", description="Shown in logs and reports.")
    output_dir: str = Field(
        min_length=1, description="Folder of the run: config, metrics, checkpoints, report."
    )
    resume: str = Field(
        default="auto",
        min_length=1,
        description="auto: from the newest complete checkpoint in output_dir, if any; never: "
        "output_dir must hold none; or the path of a checkpoint: of another run (also "
        "s3://bucket/name), to start from while output_dir holds none; of this run, to roll back "
        "to it.",
    )


class RunConfig(Section):
    """The whole of a run."""

    task: Task = Field(
        default="pretrain",
        description="pretrain: next tokens of plain text; sft: the answers of conversations; dpo: "
        "preferences between answers.  The last two read shards of preprocess --task.",
    )
    seed: int = Field(
        default=1234, ge=0, lt=2**32, description="Seed of the weights and of the sample order."
    )
    run: RunSection
    model: ModelConfig
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    precision: PrecisionConfig = Field(default_factory=PrecisionConfig)
    data: DataConfig
    batch: BatchConfig
    optimizer: OptimizerConfig
    dpo: DpoConfig = Field(default_factory=DpoConfig)
    lora: LoraConfig | None = None
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    training: TrainingConfig
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    resilience: ResilienceConfig = Field(default_factory=ResilienceConfig)

    @model_validator(mode="before")
    @classmethod
    def _mask_documents_of_chats(cls, values: Any) -> Any:
        """Conversations packed into a sample never see each other: that is no choice."""
        if isinstance(values, dict) and values.get("task") in ("sft", "dpo"):
            data = values.get("data")
            if isinstance(data, dict):
                values = {**values, "data": {"document_mask": True, **data}}
        return values

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step over all ranks."""
        return self.batch.global_ * self.data.sequence_length

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run, from `training.steps` or `training.tokens`."""
        if self.training.steps is not None:
            return self.training.steps
        return -(-(self.training.tokens or 0) // self.tokens_per_step)

    def data_parallel_size(self, world_size: int) -> int:
        """Number of data-parallel ranks among `world_size` processes."""
        parallel = self.parallel
        return world_size // (parallel.tensor * parallel.pipeline * parallel.context)

    def num_micro_batches(self, world_size: int) -> int | None:
        """Micro-batches of one rank in one step; None when the global batch does not divide."""
        samples = self.batch.micro * max(1, self.data_parallel_size(world_size))
        return None if self.batch.global_ % samples else self.batch.global_ // samples
