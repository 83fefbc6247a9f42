"""Checks that need more than one key, or the number of processes; all mistakes at once."""

from __future__ import annotations

import re
from collections.abc import Iterator

from litespark.config.schema import PrecisionConfig, RunConfig
from litespark.config.validate_model import check_model
from litespark.config.validate_post_training import check_post_training
from litespark.errors import UserError, raise_user_errors


def check_config(config: RunConfig, world_size: int) -> None:
    """Raise every mistake that `validate` finds, together.

    Raises:
        UserError: the configuration cannot run on `world_size` processes.
    """
    raise_user_errors(validate(config, world_size))


def validate(config: RunConfig, world_size: int) -> list[UserError]:
    """All mistakes of a configuration that is to run on `world_size` processes."""
    return [
        *_check_degrees(config, world_size),
        *check_model(config),
        *_check_backend(config),
        *_check_precision(config),
        *_check_fp8_options(config),
        *_check_pipeline(config, world_size),
        *_check_batch(config, world_size),
        *_check_lengths(config),
        *_check_documents(config),
        *_check_training(config),
        *_check_cuda_graph(config),
        *_check_exports(config),
        *_check_resilience(config),
        *check_post_training(config),
        *_check_stores(config),
    ]


def _check_stores(config: RunConfig) -> Iterator[UserError]:
    mirror, resume = config.checkpoint.mirror, config.run.resume
    for key, value in (("checkpoint.mirror", mirror), ("run.resume", resume)):
        if value is None or (key == "run.resume" and "://" not in value):
            continue
        if not re.fullmatch(r"s3://[^/]+/.*[^/].*", value):
            yield UserError(
                f"{key} = {value}",
                "is no place in an object store",
                "Give s3://BUCKET/NAME; for other stores set AWS_ENDPOINT_URL.",
            )


def _check_degrees(config: RunConfig, world_size: int) -> Iterator[UserError]:
    parallel = config.parallel
    model_ranks = parallel.tensor * parallel.pipeline * parallel.context
    degrees = (
        f"parallel.tensor x pipeline x context = "
        f"{parallel.tensor} x {parallel.pipeline} x {parallel.context} = {model_ranks}"
    )
    if world_size < model_ranks or world_size % model_ranks:
        yield UserError(
            degrees,
            f"does not divide the number of processes, {world_size}",
            f"Start a multiple of {model_ranks} processes (--nproc {model_ranks}), "
            "or change a degree.",
        )
    if parallel.sequence and parallel.tensor == 1:
        yield UserError(
            "parallel.sequence = true",
            "splits the sequence over tensor-parallel ranks, and parallel.tensor is 1",
            "Set parallel.sequence=false, or parallel.tensor above 1.",
        )
    if parallel.overlap_param_gather and not (
        parallel.distributed_optimizer and parallel.overlap_grad_reduce
    ):
        yield UserError(
            "parallel.overlap_param_gather = true",
            "needs parallel.distributed_optimizer and parallel.overlap_grad_reduce",
            "Set both to true, or this to false.",
        )


# Parts of a model that the fused blocks do not compute.
_REFERENCE_ONLY = {"qkv_bias": "biases of QKV", "qk_norm": "norms of query and key"}


def _check_backend(config: RunConfig) -> Iterator[UserError]:
    """What a backend can compute on no machine; the rest is found at the start of a run."""
    model, tensor = config.model, config.parallel.tensor
    is_fp8 = config.precision.mode == "fp8"
    if model.backend == "te" and config.precision.mode == "fp32":
        yield UserError(
            "model.backend = te", "computes in bf16 or fp8", "Set precision.mode=bf16 or fp8."
        )
    if model.backend == "reference" and is_fp8:
        yield UserError(
            "precision.mode = fp8",
            "is not computed by model.backend = reference",
            "Set model.backend=auto, triton or te, or precision.mode=bf16.",
        )
    is_fused = model.backend == "triton" or (model.backend == "auto" and is_fp8)
    for key, what in _REFERENCE_ONLY.items():
        if getattr(model, key) and (is_fused or model.backend == "te"):
            yield UserError(
                f"model.{key} = true",
                f"{what} are computed by model.backend = reference alone",
                "Set model.backend=auto" + (" and precision.mode=bf16." if is_fp8 else "."),
            )
    if is_fused and model.num_query_groups < tensor:
        yield UserError(
            f"model.num_query_groups = {model.num_query_groups}",
            f"leaves some of parallel.tensor = {tensor} ranks without a key/value head of their "
            "own, which the fused blocks (model.backend = triton) need",
            f"Set parallel.tensor={model.num_query_groups} or less, or model.backend="
            + ("te." if is_fp8 else "auto."),
        )


def _check_precision(config: RunConfig) -> Iterator[UserError]:
    precision, model, tensor = config.precision, config.model, config.parallel.tensor
    if precision.mode != "fp8":
        return
    if precision.guard_every is not None and model.backend == "te":
        yield UserError(
            f"precision.guard_every = {precision.guard_every}",
            "compares layer by layer, which model.backend = te has no way to do",
            "Set model.backend=triton, or leave out guard_every.",
        )
    first_or_last = precision.bf16_first_layers + precision.bf16_last_layers > 0
    if model.backend == "te" and precision.recipe == "delayed" and first_or_last:
        yield UserError(
            "precision.recipe = delayed",
            "cannot keep layers in BF16 with model.backend = te (megatron-core's restriction)",
            "Set precision.recipe=tensorwise, or model.backend=triton.",
        )
    kept = precision.bf16_first_layers + precision.bf16_last_layers
    if kept >= model.num_layers:
        yield UserError(
            f"precision.bf16_first_layers + bf16_last_layers = {kept}",
            f"leaves none of the {model.num_layers} layers in FP8",
            "Lower them, or set precision.mode=bf16.",
        )
    # cuBLAS' FP8 products read 16 bytes at a time; a scale of the blockwise recipe covers 128.
    unit = 128 if precision.recipe == "blockwise" else 16
    tokens = config.batch.micro * config.data.sequence_length // config.parallel.context
    sizes = {
        "model.hidden_size": model.hidden_size,
        "model.ffn_hidden_size / parallel.tensor": model.ffn_hidden_size // tensor,
        "query and key/value width / parallel.tensor": (
            model.head_dim * (model.num_attention_heads + 2 * model.num_query_groups) // tensor
        ),
        "query width / parallel.tensor": model.head_dim * model.num_attention_heads // tensor,
        "tokens of a micro-batch": tokens,
    }
    for name, size in sizes.items():
        if size % unit:
            yield UserError(
                f"precision.mode = fp8 ({precision.recipe})",
                f"needs multiples of {unit}, and {name} is {size}",
                f"Change it to a multiple of {unit}, or set precision.mode=bf16.",
            )


def _check_fp8_options(config: RunConfig) -> Iterator[UserError]:
    """Options without effect under this recipe and backend: whoever sets one expects one."""
    precision, is_te = config.precision, config.model.backend == "te"
    if precision.mode != "fp8":
        return
    recipe = precision.recipe
    where = f"precision.recipe = {recipe}" + (" and model.backend = te" if is_te else "")
    options = (
        ("primary_weights", recipe != "blockwise" and not is_te),
        ("margin", recipe == "delayed" or (recipe == "tensorwise" and not is_te)),
        ("fc1_output", precision.fc1_output != "fp8" or (recipe == "delayed" and not is_te)),
        ("fast_accumulation", recipe != "blockwise" and not is_te),
    )
    for name, has_effect in options:
        value, default = getattr(precision, name), PrecisionConfig.model_fields[name].default
        default_text = "null" if default is None else default
        if value != default and not has_effect:
            yield UserError(
                f"precision.{name} = {value}",
                f"has no effect with {where}",
                f"Set precision.{name}={default_text}, or another recipe or backend.",
            )


def _check_pipeline(config: RunConfig, world_size: int) -> Iterator[UserError]:
    parallel, layers = config.parallel, config.model.num_layers
    chunks = parallel.pipeline * parallel.virtual_pipeline
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        yield UserError(
            f"parallel.virtual_pipeline = {parallel.virtual_pipeline}",
            "interleaves pipeline stages, and parallel.pipeline is 1",
            "Set parallel.pipeline above 1, or virtual_pipeline to 1.",
        )
    if layers % chunks:
        yield UserError(
            f"model.num_layers = {layers}",
            f"is not divisible by parallel.pipeline x virtual_pipeline = {chunks}",
            f"Choose degrees whose product divides {layers}.",
        )
    micro_batches = config.num_micro_batches(world_size)
    if parallel.virtual_pipeline > 1 and micro_batches and micro_batches % parallel.pipeline:
        yield UserError(
            f"batch.global = {config.batch.global_}",
            f"makes {micro_batches} micro-batches a rank, and the interleaved schedule needs a "
            f"multiple of parallel.pipeline = {parallel.pipeline}",
            "Change batch.global or batch.micro.",
        )


def _check_batch(config: RunConfig, world_size: int) -> Iterator[UserError]:
    if config.num_micro_batches(world_size) is None:
        replicas = max(1, config.data_parallel_size(world_size))
        yield UserError(
            f"batch.global = {config.batch.global_}",
            f"is not divisible by batch.micro x data-parallel size = "
            f"{config.batch.micro} x {replicas}",
            f"Give a multiple of {config.batch.micro * replicas}.",
        )


def _check_lengths(config: RunConfig) -> Iterator[UserError]:
    length, parallel = config.data.sequence_length, config.parallel
    if length > config.model.max_sequence_length:
        yield UserError(
            f"data.sequence_length = {length}",
            f"is above model.max_sequence_length = {config.model.max_sequence_length}",
            "Shorten the samples or raise the model's limit.",
        )
    window = config.model.sliding_window
    if window is not None and length > window:
        yield UserError(
            f"data.sequence_length = {length}",
            f"is above model.sliding_window = {window}, beyond which attention would have to "
            "forget, and it is not computed so",
            f"Give {window} or less.",
        )
    # Context parallelism gives each rank two chunks of the sequence so that causal work is even.
    divisor, factors = 1, []
    if parallel.context > 1:
        divisor, factors = 2 * parallel.context, ["2", "parallel.context"]
    if parallel.sequence:
        divisor, factors = divisor * parallel.tensor, [*factors, "parallel.tensor"]
    if length % divisor:
        yield UserError(
            f"data.sequence_length = {length}",
            f"is not divisible by {divisor} ({' x '.join(factors)})",
            f"Give a multiple of {divisor}.",
        )
    if not config.data.blend:
        yield UserError("data.blend = []", "names no corpus", "Give at least one prefix.")
    if min(config.data.split) < 0 or config.data.split[0] <= 0:
        yield UserError(
            f"data.split = {list(config.data.split)}",
            "needs a training share above 0 and no negative share",
            "Write e.g. [99, 1, 0].",
        )


def _check_documents(config: RunConfig) -> Iterator[UserError]:
    if config.data.document_mask and config.model.backend == "te":
        yield UserError(
            "data.document_mask = true with model.backend = te",
            "is not supported: document masks are computed by the backends triton and reference",
            "Set model.backend=auto, or data.document_mask=false.",
        )
    if config.data.packing == "whole" and not config.data.document_mask:
        yield UserError(
            "data.packing = whole with data.document_mask = false",
            "would let the documents that share a sample see each other",
            "Set data.document_mask=true, or data.packing=stream.",
        )


def _check_training(config: RunConfig) -> Iterator[UserError]:
    training, schedule = config.training, config.schedule
    if (training.steps is None) == (training.tokens is None):
        yield UserError(
            f"training.steps = {training.steps}, training.tokens = {training.tokens}",
            "exactly one of the two says how long to train",
            "Give one and leave out the other.",
        )
        return
    if schedule.warmup_steps > config.total_steps:
        yield UserError(
            f"schedule.warmup_steps = {schedule.warmup_steps}",
            f"is above the run's {config.total_steps} steps",
            "Shorten the warm-up or train longer.",
        )
    decay, warmup = schedule.decay_steps, schedule.warmup_steps
    if decay is not None and schedule.kind in ("cosine", "linear") and decay <= warmup:
        yield UserError(
            f"schedule.decay_steps = {decay}",
            f"counts from step 0 and ends within the {warmup} steps of warm-up",
            "Give more than schedule.warmup_steps, or leave it out to decay to the end.",
        )
    if decay is not None and schedule.kind == "wsd" and warmup + decay > config.total_steps:
        yield UserError(
            f"schedule.decay_steps = {decay}",
            f"and {warmup} steps of warm-up do not fit into the run's {config.total_steps} steps",
            "Shorten the decay or train longer.",
        )
    if schedule.min_lr > config.optimizer.lr:
        yield UserError(
            f"schedule.min_lr = {schedule.min_lr}",
            f"is above optimizer.lr = {config.optimizer.lr}",
            "Give a floor below the peak.",
        )
    if training.eval_every is not None and config.data.split[1] <= 0:
        yield UserError(
            f"training.eval_every = {training.eval_every}",
            "evaluates, and data.split leaves nothing for validation",
            "Write e.g. data.split=[99,1,0], or leave out eval_every.",
        )


def _check_cuda_graph(config: RunConfig) -> Iterator[UserError]:
    """A recorded step does the same work on tensors of the same sizes, without the host."""
    if not config.training.cuda_graph:
        return
    key = "training.cuda_graph = true"
    if config.model.backend in ("reference", "te"):
        yield UserError(
            key,
            f"records the fused blocks, and model.backend = {config.model.backend}",
            "Set model.backend=triton, or training.cuda_graph=false.",
        )
    for what in _unfused_parts(config):
        yield UserError(
            key,
            f"records the fused blocks, and with {what} the reference computes",
            "Set training.cuda_graph=false.",
        )
    if config.task != "pretrain" or config.data.document_mask:
        what = f"task = {config.task}" if config.task != "pretrain" else "data.document_mask = true"
        yield UserError(
            key,
            f"takes every batch to be of the same sizes, and with {what} documents differ",
            "Set training.cuda_graph=false.",
        )
    if config.training.recompute == "full":
        yield UserError(
            key,
            "cannot record the random states that training.recompute = full keeps",
            "Set training.recompute=selective or none, or training.cuda_graph=false.",
        )


def _unfused_parts(config: RunConfig) -> Iterator[str]:
    """What makes model.backend = auto take the reference for the model, on any machine."""
    model, tensor = config.model, config.parallel.tensor
    for name in _REFERENCE_ONLY:
        if getattr(model, name):
            yield f"model.{name} = true"
    if model.num_query_groups < tensor:
        yield f"model.num_query_groups = {model.num_query_groups} < parallel.tensor = {tensor}"


def _check_exports(config: RunConfig) -> Iterator[UserError]:
    every, saved = config.checkpoint.export_hf_every, config.training.save_every
    if every is not None and (saved is None or every % saved):
        yield UserError(
            f"checkpoint.export_hf_every = {every}",
            "exports checkpoints, and is no multiple of training.save_every = "
            f"{'null' if saved is None else saved}",
            f"Set training.save_every={every}, or a divisor of it.",
        )


def _check_resilience(config: RunConfig) -> Iterator[UserError]:
    resilience = config.resilience
    patience, timeout = resilience.hang_seconds, resilience.collective_timeout_seconds
    if patience is not None and patience >= timeout:
        yield UserError(
            f"resilience.hang_seconds = {patience:g}",
            f"is not below resilience.collective_timeout_seconds = {timeout:g}, which would end "
            "the run first and not say where it hangs",
            "Lower the one or raise the other.",
        )
    precision = config.precision
    if resilience.recheck_every and precision.mode == "fp8" and precision.recipe == "delayed":
        yield UserError(
            f"resilience.recheck_every = {resilience.recheck_every}",
            "computes a step's losses again after its delayed scales have moved on, and would "
            "never find the same",
            "Leave it out, or take another precision.recipe.",
        )
