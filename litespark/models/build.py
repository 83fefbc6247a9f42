"""Builds the part of the model that this rank holds: one chunk, or several when interleaved."""

from __future__ import annotations

from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from litespark.config.schema import RunConfig
from litespark.models.backends import Backend, select_backend
from litespark.models.gpt import GPT
from litespark.models.initialize import initialize_weights
from litespark.models.layer_specs import block_spec
from litespark.modules.low_rank import freeze_base
from litespark.parallel.marks import check_parameter_marks


def build_chunks(config: RunConfig, core_config: TransformerConfig) -> list[GPT]:
    """This rank's model chunks with their initial weights, on this rank's device.

    Raises:
        LitesparkError: a parameter lacks a mark that megatron-core needs for right gradients.
        UserError: the backend asked for cannot compute this configuration here.
    """
    interleaved = core_config.virtual_pipeline_model_parallel_size
    stages: list[int | None] = list(range(interleaved)) if interleaved else [None]
    backend = select_backend(config)
    chunks = [_build_chunk(config, core_config, backend, stage) for stage in stages]
    backend.policy.allocate(next(chunks[0].parameters()).device)
    initialize_weights(chunks, config.seed)
    if config.lora is not None:
        for chunk in chunks:
            freeze_base(chunk)
    for chunk in chunks:
        check_parameter_marks(chunk, core_config)
    return chunks


def _build_chunk(
    config: RunConfig, core_config: TransformerConfig, backend: Backend, stage: int | None
) -> GPT:
    return GPT(
        core_config,
        block_spec(backend, core_config, stage),
        config.model,
        backend,
        virtual_stage=stage,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
        groups=ProcessGroupCollection.use_mpu_process_groups(),
    )
