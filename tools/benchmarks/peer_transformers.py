"""What most people run: Hugging Face Transformers with torch's attention, bf16 autocast.

    python tools/benchmarks/peer_transformers.py --micro-batch 4
    python tools/benchmarks/peer_transformers.py --micro-batch 4 --compile

Weights and moments are fp32, the optimizer is torch's fused AdamW.  With --compile every layer goes
through torch.compile.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

# The folder of this script would be searched first, and its kernels.py taken for the package
# `kernels`; the checkout in its place makes litespark importable where it is not installed.
sys.path[0] = str(Path(__file__).resolve().parents[2])
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch  # noqa: E402 - after the setting that is read when CUDA starts

from litespark.config.schema import ModelConfig  # noqa: E402
from tools.benchmarks.common import (  # noqa: E402
    measure,
    model_of,
    peer_parser,
    random_tokens,
)


def build(args: argparse.Namespace, model: ModelConfig) -> torch.nn.Module:
    """The model in fp32, in training mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups,
        head_dim=model.head_dim,
        max_position_embeddings=args.seq_length,
        tie_word_embeddings=model.tie_embeddings,
        attn_implementation=args.attention,  # type: ignore[call-arg] - of its base class
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        llama = LlamaForCausalLM(config).train()
    if args.recompute:
        llama.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if args.compile:
        for layer in llama.model.layers:
            layer.compile()
    return llama


def make_step(args: argparse.Namespace, model: ModelConfig) -> Callable[[], torch.Tensor]:
    """One optimizer step over all micro-batches; it returns the last micro-batch's loss."""
    llama = build(args, model)
    optimizer = torch.optim.AdamW(
        llama.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    tokens = random_tokens(args, model.vocab_size)[:, :, :-1].contiguous()

    def step() -> torch.Tensor:
        loss = torch.zeros(())
        for ids in tokens:
            with torch.autocast("cuda", torch.bfloat16):
                loss = llama(input_ids=ids, labels=ids).loss
            (loss / args.accumulate).backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def main() -> None:
    """Measure, and print the result."""
    parser = peer_parser(__doc__)
    parser.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing")
    parser.add_argument("--compile", action="store_true", help="torch.compile of every layer")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    import transformers

    model = model_of(args)
    name = f"transformers {transformers.__version__}"
    precision = {"mode": "bf16", "autocast": True}
    print(json.dumps(measure(make_step(args, model), args, model, name, precision)), flush=True)


if __name__ == "__main__":
    main()
