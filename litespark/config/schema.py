"""What a run's YAML may say: every section, every key, its type, its unit and its default.

All sections are frozen and refuse unknown keys, so a misspelt key is an error and never ignored.
Types are strict: `tensor: "2"` or `tensor: true` is an error, not a guess.  Checks that need more
than one section stand in `validate.py`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from litespark.config.blends import expand_blend
from litespark.config.metering import MeteringConfig
from litespark.config.model import ModelConfig
from litespark.config.post_training import DpoConfig, LoraConfig, Task
from litespark.config.precision import PrecisionConfig
from litespark.config.resilience import ResilienceConfig
from litespark.config.section import Section


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
    cuda_graph: bool = Field(
        default=False,
        description="Record the forward and backward passes of the fourth step as a CUDA graph and "
        "replay it from then on, so that the GPU need not wait for Python: for small models, and "
        "layers split over many ranks. Fused blocks, plain text without document masks. No effect "
        "on a CPU.",
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
    export_hf_every: int | None = Field(
        default=None,
        ge=1,
        description="Beside the checkpoints of these steps write Hugging Face folders, "
        "<output_dir>/hf/step_...: a process of its own does it, training waits for none. A "
        "multiple of training.save_every; in steps. null: never.",
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
    mlflow_experiment: str | None = Field(
        default=None,
        description="MLflow experiment; needs the extra litespark[mlflow]. MLFLOW_TRACKING_URI "
        "says where the server is.",
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
    init_from: str | None = Field(
        default=None,
        min_length=1,
        description="Start with these weights, at step 0 with a new optimizer and schedule: a "
        "Hugging Face folder (safetensors), or a checkpoint of Litespark, at any layout. Once "
        "output_dir holds a checkpoint, that is resumed from and this is not read.",
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
    metering: MeteringConfig = Field(default_factory=MeteringConfig)
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
