"""The closest peer: plain Megatron-Core with Transformer Engine on one GPU.

    python tools/benchmarks/peer_mcore.py --precision fp8 --recipe delayed --fp8-param
    python tools/benchmarks/peer_mcore.py --precision bf16 --micro-batch 2

Everything that makes it fast is on: Transformer Engine's fused layers, its cross-entropy, fused
RoPE and SwiGLU, gradients accumulated inside the weight-gradient products, the distributed
optimizer with fp32 main gradients.  It needs Transformer Engine, and runs with whichever
megatron-core (0.16 to 0.19) comes first on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import types
import warnings
from collections.abc import Callable, Iterator
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


def start_one_process() -> None:
    """torch.distributed and megatron-core's groups for this process alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.cuda.set_device(0)
    torch.distributed.init_process_group("nccl", rank=0, world_size=1)
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(0)


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


def build(args: argparse.Namespace, model: ModelConfig) -> tuple[Any, Any]:
    """The wrapped model and its optimizer."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.module import Float16Module

    config = core_config(args, model)
    gpt = GPTModel(
        config,
        get_gpt_layer_with_transformer_engine_spec(),
        vocab_size=model.padded_vocab_size,
        max_sequence_length=args.seq_length,
        position_embedding_type="rope",
        rotary_base=int(model.rope_theta),
        share_embeddings_and_output_weights=model.tie_embeddings,
    ).cuda()
    wrapped = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True),
        Float16Module(config, gpt),
    )
    wrapped.broadcast_params()
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
        ),
        [wrapped],
    )
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    return wrapped, optimizer


def make_step(args: argparse.Namespace, model: ModelConfig) -> Callable[[], torch.Tensor]:
    """One optimizer step over all micro-batches; it returns the last micro-batch's loss."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    wrapped, optimizer = build(args, model)
    schedule: Any = get_forward_backward_func()
    tokens = random_tokens(args, model.vocab_size)
    batches = [(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()) for ids in tokens]
    positions_bs = torch.arange(args.seq_length, device="cuda").expand(args.micro_batch, -1)

    def loss_function(losses_bs: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = losses_bs.float().mean()
        return loss, {"loss": loss.detach()}

    def forward(iterator: Iterator[Any], gpt: Any) -> tuple[torch.Tensor, Callable]:
        tokens_bs, labels_bs = next(iterator)
        return gpt(tokens_bs, positions_bs, None, labels=labels_bs), loss_function

    def step() -> torch.Tensor:
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        reports = schedule(
            forward_step_func=forward,
            data_iterator=iter(batches),
            model=wrapped,
            num_microbatches=args.accumulate,
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch,
            forward_only=False,
        )
        optimizer.step()
        return reports[-1]["loss"]

    return step


def main() -> None:
    """Measure, and print the result."""
    parser = peer_parser(__doc__)
    parser.add_argument("--precision", choices=["bf16", "fp8"], default="bf16")
    parser.add_argument(
        "--recipe", choices=["delayed", "tensorwise", "blockwise"], default="delayed"
    )
    parser.add_argument("--fp8-param", action="store_true", help="keep the weights in fp8")
    parser.add_argument("--attention", choices=["fused", "flash", "auto"], default="fused")
    args = parser.parse_args()
    provide_weight_gradient_products()
    start_one_process()
    import megatron.core
    import transformer_engine  # type: ignore[import-not-found] - only where there are GPUs

    model = model_of(args)
    precision = {"mode": args.precision}
    if args.precision == "fp8":
        precision |= {"recipe": args.recipe, "fp8_param": args.fp8_param}
    name = f"megatron-core {megatron.core.__version__} + TE {transformer_engine.__version__}"
    measure(make_step(args, model), args, model, name, precision)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
