"""The closest peer: plain Megatron-Core with Transformer Engine, on one GPU or several.

    python tools/benchmarks/peer_mcore.py --precision fp8 --recipe delayed --fp8-param
    python tools/benchmarks/peer_mcore.py --precision bf16 --micro-batch 2
    torchrun --nproc-per-node 4 tools/benchmarks/peer_mcore.py --tensor 2 --pipeline 2 --virtual 2

Everything that makes it fast is on: Transformer Engine's fused layers, its cross-entropy, fused
RoPE and SwiGLU, gradients accumulated inside the weight-gradient products, the distributed
optimizer with fp32 main gradients, whose gradients are reduced during backward and weights gathered
during forward; sequence parallelism with tensor parallelism; sends that overlap where stages are
interleaved.  It needs Transformer Engine, and runs with whichever
megatron-core (0.16 to 0.19) comes first on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

# The folder of this script would be searched first, and its kernels.py taken for the package
# `kernels`; the checkout in its place makes litespark importable where it is not installed.
sys.path[0] = str(Path(__file__).resolve().parents[2])
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
warnings.filterwarnings("ignore")

import torch  # noqa: E402 - after the settings that are read when CUDA starts

from litespark.config.schema import ModelConfig  # noqa: E402
from litespark.parallel.layout import RankLayout  # noqa: E402
from tools.benchmarks.common import (  # noqa: E402
    measure,
    model_of,
    peer_parser,
    random_tokens,
)


def provide_weight_gradient_products() -> None:
    """Stand in for apex's extension that adds a weight gradient to the fp32 sum in the product.

    megatron-core asks for it by this name for the LM head; without it the peer would lose the
    fusion for want of a package, and the comparison would flatter us.
    """

    def accumulate(x_mk: torch.Tensor, grad_mn: torch.Tensor, main_grad_nk: torch.Tensor) -> None:
        try:
            torch.addmm(main_grad_nk, grad_mn.t(), x_mk, out_dtype=torch.float32, out=main_grad_nk)
        except (RuntimeError, TypeError):  # a torch whose addmm has no out_dtype
            main_grad_nk.add_(torch.mm(grad_mn.t(), x_mk))

    module: Any = types.ModuleType("fused_weight_gradient_mlp_cuda")
    module.wgrad_gemm_accum_fp32 = module.wgrad_gemm_accum_fp16 = accumulate
    sys.modules["fused_weight_gradient_mlp_cuda"] = module


def start_processes(args: argparse.Namespace) -> RankLayout:
    """torch.distributed and megatron-core's groups, for this process alone without torchrun."""
    if "WORLD_SIZE" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl")
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=args.tensor,
        pipeline_model_parallel_size=args.pipeline,
        virtual_pipeline_model_parallel_size=args.virtual if args.virtual > 1 else None,
        context_parallel_size=args.context,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(0)
    world_size = int(os.environ["WORLD_SIZE"])
    return RankLayout(
        tensor=args.tensor,
        context=args.context,
        data=world_size // (args.tensor * args.context * args.pipeline),
        pipeline=args.pipeline,
    )


def stop_processes() -> None:
    """Leave all groups, so that this process can join others."""
    from megatron.core import parallel_state

    with suppress(ImportError):  # its place has changed over the versions
        from transformer_engine.pytorch.quantization import (  # type: ignore[import-not-found]
            FP8GlobalStateManager,
        )

        FP8GlobalStateManager.reset()  # it holds the groups that share largest values
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def core_config(args: argparse.Namespace, model: ModelConfig) -> Any:
    """megatron-core's configuration, with every fusion that it offers for a Llama."""
    from megatron.core.transformer.enums import AttnBackend
    from megatron.core.transformer.transformer_config import TransformerConfig

    options: dict[str, Any] = {}
    if args.precision == "fp8":
        options = {
            "fp8": "e4m3" if args.recipe == "blockwise" else "hybrid",
            "fp8_recipe": args.recipe,
            "fp8_param": args.fp8_param,
            "fp8_amax_history_len": 1024 if args.recipe == "delayed" else 1,
            "fp8_amax_compute_algo": "max",
        }
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        tensor_model_parallel_size=args.tensor,
        sequence_parallel=args.tensor > 1,
        pipeline_model_parallel_size=args.pipeline,
        virtual_pipeline_model_parallel_size=args.virtual if args.virtual > 1 else None,
        overlap_p2p_comm=args.virtual > 1,
        batch_p2p_comm=args.virtual == 1,
        deallocate_pipeline_outputs=True,
        context_parallel_size=args.context,
        attention_backend=AttnBackend[args.attention],
        bias_activation_fusion=True,
        bias_dropout_fusion=True,
        apply_rope_fusion=True,
        masked_softmax_fusion=True,
        gradient_accumulation_fusion=True,
        cross_entropy_loss_fusion=True,
        cross_entropy_fusion_impl="te",
        **options,
    )


def build(args: argparse.Namespace, model: ModelConfig, layout: RankLayout) -> tuple[Any, Any]:
    """The wrapped chunks of the model that this rank holds, and their optimizer."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.module import Float16Module

    config = core_config(args, model)
    overlap = layout.data * layout.context > 1
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
        fp8_param_gather=args.precision == "fp8" and args.fp8_param,
    )
    stages = list(range(args.virtual)) if args.virtual > 1 else [None]
    chunks: list[Any] = [
        DistributedDataParallel(
            config,
            ddp_config,
            Float16Module(config, build_chunk(args, model, config, stage)),
            disable_bucketing=number > 0,
        )
        for number, stage in enumerate(stages)
    ]
    for chunk in chunks:
        chunk.broadcast_params()
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-4,
            weight_decay=0.1,
            adam_beta2=0.95,
            clip_grad=1.0,
            bf16=True,
            params_dtype=torch.bfloat16,
            use_distributed_optimizer=True,
            overlap_param_gather=overlap,
        ),
        chunks,
    )

    def one_or_all(functions: list[Callable]) -> Any:
        return functions if len(functions) > 1 else functions[0]

    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    if overlap:
        config.no_sync_func = one_or_all([chunk.no_sync for chunk in chunks])
        config.grad_sync_func = one_or_all([chunk.start_grad_sync for chunk in chunks])
        config.param_sync_func = one_or_all([chunk.start_param_sync for chunk in chunks])
    return chunks, optimizer


def build_chunk(args: argparse.Namespace, model: ModelConfig, config: Any, stage: Any) -> Any:
    """One chunk of the model on the GPU; `stage` counts chunks where they are interleaved."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.models.gpt.gpt_model import GPTModel

    ends = {"ignore_virtual": False, "vp_stage": stage}
    return GPTModel(
        config,
        get_gpt_layer_with_transformer_engine_spec(),
        vocab_size=model.padded_vocab_size,
        max_sequence_length=args.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(**ends),
        post_process=parallel_state.is_pipeline_last_stage(**ends),
        position_embedding_type="rope",
        rotary_base=int(model.rope_theta),
        share_embeddings_and_output_weights=model.tie_embeddings,
        vp_stage=stage,
    ).cuda()


def own_part(rows_bs: torch.Tensor, layout: RankLayout) -> torch.Tensor:
    """The two chunks of each row that this context-parallel rank holds, as megatron-core wants."""
    if layout.context == 1:
        return rows_bs.contiguous()
    rank = layout.coordinates(int(os.environ["RANK"])).context
    chunks = rows_bs.chunk(2 * layout.context, dim=1)
    return torch.cat([chunks[rank], chunks[2 * layout.context - 1 - rank]], dim=1)


def make_step(
    args: argparse.Namespace, model: ModelConfig, layout: RankLayout
) -> Callable[[], torch.Tensor | None]:
    """One optimizer step over all micro-batches; returns the last micro-batch's loss, if here."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    chunks, optimizer = build(args, model, layout)
    schedule: Any = get_forward_backward_func()
    tokens = random_tokens(args, model.vocab_size)
    batches = [(own_part(ids[:, :-1], layout), own_part(ids[:, 1:], layout)) for ids in tokens]
    positions_bs = torch.arange(args.seq_length, device="cuda").expand(args.micro_batch, -1)
    positions_bs = own_part(positions_bs, layout)

    def loss_function(losses_bs: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = losses_bs.float().mean()
        return loss, {"loss": loss.detach()}

    def forward(iterator: Iterator[Any], gpt: Any) -> tuple[torch.Tensor, Callable]:
        tokens_bs, labels_bs = next(iterator)
        return gpt(tokens_bs, positions_bs, None, labels=labels_bs), loss_function

    def step() -> torch.Tensor | None:
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        iterators = [iter(batches) for _ in chunks]
        reports = schedule(
            forward_step_func=forward,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=args.accumulate,
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch,
            forward_only=False,
        )
        optimizer.step()
        return reports[-1]["loss"] if reports else None

    return step


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = peer_parser(__doc__)
    add = made.add_argument
    add("--precision", choices=["bf16", "fp8"], default="bf16")
    add("--recipe", choices=["delayed", "tensorwise", "blockwise"], default="delayed")
    add("--fp8-param", action="store_true", help="keep the weights in fp8")
    add("--attention", choices=["fused", "flash", "auto"], default="fused")
    add("--tensor", type=int, default=1, help="tensor-parallel size, with sequence parallelism")
    add("--pipeline", type=int, default=1, help="pipeline stages")
    add("--virtual", type=int, default=1, help="model chunks of a stage; above 1: interleaved")
    add("--context", type=int, default=1, help="context-parallel size")
    return made


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Set up, measure, and leave the process as it was."""
    provide_weight_gradient_products()
    layout = start_processes(args)
    import megatron.core
    import transformer_engine  # type: ignore[import-not-found] - only where there are GPUs

    model = model_of(args)
    precision = {"mode": args.precision}
    if args.precision == "fp8":
        precision |= {"recipe": args.recipe, "fp8_param": args.fp8_param}
    name = f"megatron-core {megatron.core.__version__} + TE {transformer_engine.__version__}"
    result = measure(make_step(args, model, layout), args, model, name, precision, layout)
    stop_processes()
    return result


def main() -> None:
    """Measure, and print the result."""
    result = measured(parser().parse_args())
    if os.environ["RANK"] == "0":
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
