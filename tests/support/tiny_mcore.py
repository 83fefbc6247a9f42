"""A small GPT of plain megatron-core, trained in any layout from the same weights and data.

Every layout starts from weights that depend on a parameter's global name and offset only, so the
losses of two layouts can be compared without a checkpoint.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

VOCAB = 128
SEQ = 32
MICRO_BATCH = 2
GLOBAL_MICRO_BATCHES = 4
FIRST_SEED = 7


@dataclass(frozen=True)
class Layout:
    """How the tiny model is cut and trained; the defaults are the single process."""

    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    sp: bool = False
    hidden: int = 64
    num_layers: int = 4
    lr: float = 1e-2
    bf16: bool = False
    distopt: bool = False
    overlap: bool = False
    bucket_size: int | None = None
    overlap_p2p: bool = False
    # More fields of TransformerConfig; left out of the hash because a mapping has none.
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)


class TinyNorm(torch.nn.Module):
    """RMSNorm that may stand under sequence parallelism; megatron-core's own refuses it."""

    def __init__(self, config, hidden_size, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class TinyRun:
    """One model with its optimizer; `steps` trains it."""

    def __init__(self, layout: Layout, prepare: Callable[[torch.nn.Module], None] | None = None):
        """Build everything; `prepare` may change a model chunk before the optimizer sees it."""
        from megatron.core import parallel_state, tensor_parallel
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        self.layout = layout
        start_groups(layout)
        tensor_parallel.model_parallel_cuda_manual_seed(123)
        self.dtype = torch.bfloat16 if layout.bf16 else torch.float32
        self.config = transformer_config(layout)
        stages = range(layout.vpp) if layout.vpp else [None]
        self.chunks = [self._build_chunk(stage) for stage in stages]
        for chunk in self.chunks:
            set_weights(chunk)
            if prepare:
                prepare(chunk)
        self.ddp = [self._wrap(chunk, index) for index, chunk in enumerate(self.chunks)]
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=layout.lr,
                min_lr=layout.lr,
                weight_decay=0.1,
                clip_grad=1.0,
                bf16=layout.bf16,
                params_dtype=self.dtype,
                use_distributed_optimizer=layout.distopt,
                overlap_param_gather=layout.overlap and layout.distopt,
            ),
            self.ddp,
        )
        config = self.config
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self.optimizer.scale_loss
        config.no_sync_func = self._per_chunk("no_sync")
        if layout.overlap:
            config.grad_sync_func = self._per_chunk("start_grad_sync")
            if layout.distopt:
                config.param_sync_func = self._per_chunk("start_param_sync")
        self.dp_size = parallel_state.get_data_parallel_world_size()
        self.dp_rank = parallel_state.get_data_parallel_rank()

    def steps(self, first: int, count: int) -> list[tuple[float, float]]:
        """Train steps `first`, `first + 1`, ... and return (loss, gradient norm) of each."""
        return [self._step(step) for step in range(first, first + count)]

    def sync_params(self) -> None:
        """Bring the parameters of all data-parallel shards up to date."""
        for ddp in self.ddp:
            ddp.start_param_sync(force_sync=True)

    def weights(self) -> dict[str, torch.Tensor]:
        """Return a copy of this rank's parameters by name."""
        return {
            f"{index}.{name}": param.detach().clone()
            for index, chunk in enumerate(self.chunks)
            for name, param in chunk.named_parameters()
        }

    def state_dict(self, *, is_loading: bool, with_optimizer: bool = True) -> dict[str, Any]:
        """Return the sharded state of the model chunks and, if asked for, of the optimizer."""
        metadata = checkpoint_metadata()
        if len(self.chunks) == 1:
            state = {"model": self.chunks[0].sharded_state_dict(metadata=metadata)}
        else:
            state = {
                f"model{index}": chunk.sharded_state_dict(metadata=metadata)
                for index, chunk in enumerate(self.chunks)
            }
        if with_optimizer:
            state["optimizer"] = self.optimizer.sharded_state_dict(
                dict(state), is_loading=is_loading, metadata=metadata
            )
        return state

    def save(self, path: str) -> None:
        """Write a checkpoint with weights and optimizer state."""
        from megatron.core import dist_checkpointing

        dist_checkpointing.save(self.state_dict(is_loading=False), path)

    def load(self, path: str) -> None:
        """Read what `save` wrote, in this layout."""
        from megatron.core import dist_checkpointing

        loaded = dist_checkpointing.load(self.state_dict(is_loading=True), path)
        for index, chunk in enumerate(self.chunks):
            chunk.load_state_dict(loaded["model" if len(self.chunks) == 1 else f"model{index}"])
        self.optimizer.load_state_dict(loaded["optimizer"])

    def _build_chunk(self, stage: int | None) -> torch.nn.Module:
        from megatron.core import parallel_state
        from megatron.core.models.gpt import GPTModel
        from megatron.core.transformer.enums import ModelType
        from megatron.core.transformer.module import Float16Module

        model = GPTModel(
            self.config,
            block_spec(self.config, stage),
            VOCAB,
            SEQ,
            pre_process=parallel_state.is_pipeline_first_stage(
                ignore_virtual=False, vp_stage=stage
            ),
            post_process=parallel_state.is_pipeline_last_stage(
                ignore_virtual=False, vp_stage=stage
            ),
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
            vp_stage=stage,
        )
        chunk = Float16Module(self.config, model) if self.layout.bf16 else model
        chunk.model_type = ModelType.encoder_or_decoder
        return chunk

    def _wrap(self, chunk: torch.nn.Module, index: int) -> torch.nn.Module:
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
        )

        layout = self.layout
        return DistributedDataParallel(
            self.config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=layout.overlap,
                overlap_param_gather=layout.overlap and layout.distopt,
                use_distributed_optimizer=layout.distopt,
                bucket_size=layout.bucket_size,
            ),
            chunk,
            disable_bucketing=index > 0 and not layout.overlap,
        )

    def _per_chunk(self, name: str) -> Any:
        functions = [getattr(ddp, name) for ddp in self.ddp]
        return functions if len(functions) > 1 else functions[0]

    def _step(self, step: int) -> tuple[float, float]:
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel import get_forward_backward_func

        for ddp in self.ddp:
            ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        count = GLOBAL_MICRO_BATCHES // self.dp_size
        first = self.dp_rank * count
        iterators = [
            iter([micro_batch(step, first + index) for index in range(count)]) for _ in self.ddp
        ]
        outputs = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.ddp if len(self.ddp) > 1 else self.ddp[0],
            num_microbatches=count,
            seq_length=SEQ,
            micro_batch_size=MICRO_BATCH,
            decoder_seq_length=SEQ,
            forward_only=False,
        )
        _, grad_norm, _ = self.optimizer.step()
        total = torch.zeros(2)
        if outputs:
            total = torch.stack([output["loss"] for output in outputs]).sum(0)
        if parallel_state.is_pipeline_last_stage():
            dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
        # The last rank is on the last pipeline stage.
        dist.broadcast(total, src=dist.get_world_size() - 1)
        return (total[0] / total[1]).item(), float(grad_norm)


def train(layout: Layout, num_steps: int, **run: Any) -> list[tuple[float, float]]:
    """Train from the common weights and return (loss, gradient norm) of each step."""
    return TinyRun(layout, **run).steps(0, num_steps)


def start_groups(layout: Layout) -> None:
    """Make the process groups of a layout, in place of those of the run before."""
    from megatron.core import parallel_state

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(layout.tp, layout.pp, layout.vpp)


def transformer_config(layout: Layout) -> Any:
    """Return the `TransformerConfig` of a layout."""
    from megatron.core.transformer import TransformerConfig

    dtype = torch.bfloat16 if layout.bf16 else torch.float32
    fields: dict[str, Any] = {
        "num_layers": layout.num_layers,
        "hidden_size": layout.hidden,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "ffn_hidden_size": 96,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cpu_initialization": True,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp,
        "sequence_parallel": layout.sp,
        "pipeline_dtype": dtype,
        "params_dtype": dtype,
        "bf16": layout.bf16,
        "transformer_impl": "local",
        "batch_p2p_comm": not layout.overlap_p2p,
        "overlap_p2p_comm": layout.overlap_p2p,
    }
    return TransformerConfig(**{**fields, **layout.config})


def block_spec(config: Any, vp_stage: int | None) -> Any:
    """Return megatron-core's local block with `TinyNorm` in every norm slot."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import (
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )

    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = TinyNorm
    layer.submodules.pre_mlp_layernorm = TinyNorm
    num_layers = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=TinyNorm)


def checkpoint_metadata() -> dict[str, Any]:
    """Return what `sharded_state_dict` has to be told in megatron-core 0.16."""
    from megatron.core import parallel_state

    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def set_weights(model: torch.nn.Module) -> None:
    """Give each parameter its part of a global tensor that depends on the global name only."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    state = model.sharded_state_dict(metadata=checkpoint_metadata())
    apply_factories(state)
    with torch.no_grad():
        for shard in nested_values(state):
            if not isinstance(shard, ShardedTensor) or "norm" in shard.key:
                continue  # norms start at one in every layout
            generator = torch.Generator().manual_seed(zlib.crc32(shard.key.encode()))
            whole = torch.randn(shard.global_shape, generator=generator) * 0.02
            local = whole[shard.global_slice()]
            shard.data.copy_(local.reshape(shard.data.shape))


def micro_batch(step: int, index: int) -> torch.Tensor:
    """Return `[MICRO_BATCH, SEQ + 1]` tokens of which every second can be predicted."""
    generator = torch.Generator().manual_seed(1000 * step + index + FIRST_SEED)
    tokens = torch.randint(0, VOCAB, (MICRO_BATCH, SEQ + 1), generator=generator)
    tokens[:, 1::2] = (tokens[:, :-1:2] * 3 + 1) % VOCAB
    return tokens


def _forward_step(iterator: Iterator[torch.Tensor], model: torch.nn.Module) -> tuple[Any, Any]:
    tokens = next(iterator)
    positions = torch.arange(SEQ).expand(MICRO_BATCH, -1)
    losses = model(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous())
    return losses, _loss


def _loss(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    total = losses.float().sum()
    count = torch.tensor(losses.numel(), dtype=torch.int)
    return total, count, {"loss": torch.stack([total.detach(), count.float()])}
