"""What every peer's script shares: its options, its tokens, and how its step is measured.

The work and the accounting are those of `litespark bench`: the shapes come from the same presets,
the FLOPs from the same count, the figures from the same code.  A script ends by printing one line
of JSON with the keys of `litespark bench --json`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from litespark.config.schema import ModelConfig
from litespark.metering.breakdown import break_down, record_kernels
from litespark.metering.energy import EnergyMeter
from litespark.metering.flops import total_parameters
from litespark.metering.measurement import Work, figures, over_ranks, software, time_steps
from litespark.metering.memory import peak_memory_bytes
from litespark.parallel.groups import gather_objects
from litespark.parallel.layout import RankLayout

ROOT = Path(__file__).resolve().parents[2]
_GIBIBYTE = 2**30
_ALONE = RankLayout(tensor=1, context=1, data=1, pipeline=1)
_SHAPE_KEYS = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"),
    *("num_query_groups", "head_dim", "vocab_size"),
)


def peer_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that describe the work; a script adds those of its stack."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="paper-3b", metavar="PRESET", help="a preset of litespark")
    add("--seq-length", type=int, default=4096, help="tokens of a sample")
    add("--micro-batch", type=int, default=4, help="samples of one forward pass")
    add("--accumulate", type=int, default=8, help="micro-batches of one step")
    add("--warmup", type=int, default=3, help="steps before the timed ones, at least 1")
    add("--steps", type=int, default=10, help="timed steps")
    add("--profile", action=argparse.BooleanOptionalAction, default=True, help="the breakdown")
    add("shape", nargs="*", metavar="key=value", help="changes to the shape, e.g. num_layers=4")
    return parser


def model_of(args: argparse.Namespace) -> ModelConfig:
    """The preset's shape with the changes of the command line."""
    changes = dict(word.split("=", 1) for word in args.shape)
    values = {key: yaml.safe_load(value) for key, value in changes.items()}
    return ModelConfig.model_validate({"preset": args.model, **values})


def random_tokens(args: argparse.Namespace, vocab_size: int) -> torch.Tensor:
    """Token ids of one step on the GPU, int64 [accumulate, b, s + 1]."""
    shape = (args.accumulate, args.micro_batch, args.seq_length + 1)
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0)).cuda()


def measure(
    step: Callable[[], torch.Tensor | None],
    args: argparse.Namespace,
    model: ModelConfig,
    implementation: str,
    precision: dict[str, Any],
    layout: RankLayout = _ALONE,
) -> dict[str, Any]:
    """Warm up, time and profile `step`; the result, whole on the first of all ranks.

    Args:
        step: one optimizer step over all micro-batches; returns a loss where there is one.
        args: parsed by `peer_parser`.
        model: the shape.
        implementation: name and version of the stack.
        precision: `mode` (bf16, fp8) and whatever else describes it.
        layout: of all ranks, in a process group if there are several.
    """
    started = psutil.Process().create_time()
    torch.cuda.synchronize()
    set_up_at = time.time()
    step()
    torch.cuda.synchronize()
    first_step_at = time.time()
    for _ in range(args.warmup - 1):
        step()
    losses: list[torch.Tensor | None] = []
    timing = time_steps(
        lambda: losses.append(step()), args.steps, torch.cuda.synchronize, EnergyMeter()
    )
    peak_bytes = peak_memory_bytes("cuda")
    loss = None if losses[-1] is None else float(losses[-1])
    all_peaks = [peak_bytes]
    if layout.world_size > 1:
        timing, all_peaks = over_ranks(timing), gather_objects(peak_bytes)
        loss = next((value for value in gather_objects(loss) if value is not None), None)
    tokens_per_step = args.accumulate * args.micro_batch * args.seq_length * layout.data
    device_name = torch.cuda.get_device_name()
    work = Work(
        model, args.seq_length, tokens_per_step, precision["mode"], device_name, layout.world_size
    )
    breakdown = break_down(*record_kernels(step), tokens_per_step) if args.profile else None
    return {
        "implementation": implementation,
        "model": model.preset,
        "shape": {key: getattr(model, key) for key in _SHAPE_KEYS},
        "parameters": total_parameters(model, model.tie_embeddings, model.qkv_bias, model.qk_norm),
        "precision": precision,
        "parallel": layout.describe(),
        "sequence_length": args.seq_length,
        "micro_batch": args.micro_batch,
        "accumulate": args.accumulate,
        "tokens": "random",
        "warmup": args.warmup,
        "device": device_name,
        "gpus": layout.world_size,
        **figures(work, timing),
        "peak_memory_gib": max(all_peaks) / _GIBIBYTE,
        "peak_memory_gib_of_ranks": [peak / _GIBIBYTE for peak in all_peaks],
        "loss": loss,
        "set_up_seconds": set_up_at - started,
        "first_step_seconds": first_step_at - set_up_at,
        "start_to_first_step_seconds": first_step_at - started,
        **software(ROOT),
        "breakdown": breakdown,
    }
