"""Small Llamas for the tests of this folder: configuration, weights, checkpoint, tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import Float16Module

from litespark.checkpoint.run_state import RunState
from litespark.checkpoint.save import save_checkpoint
from litespark.config.load import dump_config
from litespark.config.schema import RunConfig
from litespark.models.build import build_chunks
from litespark.models.gpt import GPT
from litespark.models.initialize import named_parameters_globally
from litespark.models.transformer_config import transformer_config
from litespark.parallel.groups import start_model_parallel, start_process_group
from litespark.parallel.layout import RankLayout
from litespark.parallel.rng import named_generator, seed_all
from megatron_patches import apply_patches

STEP = 7


def tiny_values(folder: str, *, precision: str = "fp32", **model: Any) -> dict[str, Any]:
    """A run's configuration as a mapping; `model` replaces values of the shape."""
    shape = {
        "num_layers": 2,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "vocab_size": 128,
        "max_sequence_length": 64,
        # Large enough for attention and logits that differ from uniform.
        "init_std": 0.15,
    }
    return {
        "run": {"output_dir": folder},
        "model": {**shape, **model},
        "precision": {"mode": precision},
        "data": {"blend": [{"prefix": "none"}], "sequence_length": 32},
        "batch": {"global": 4},
        "optimizer": {"lr": 1e-3},
        "training": {"steps": 1},
    }


def build(config: RunConfig) -> list[GPT]:
    """This rank's chunks; needs process groups.  Norm weights differ from 1, so that a confusion
    of two norms shows."""
    chunks = build_chunks(config, transformer_config(config))
    for chunk in chunks:
        for name, parameter in named_parameters_globally(chunk):
            if parameter.dim() == 1:
                generator = named_generator(1, name, parameter.device)
                with torch.no_grad():
                    parameter.normal_(1.0, 0.2, generator=generator)
    return chunks


def write_checkpoint(rank: int, world_size: int, values: dict[str, Any]) -> str:
    """Save model and optimizer as training does, in any layout; returns the checkpoint's path."""
    config = RunConfig.model_validate(values)
    process = start_process_group(60.0)
    apply_patches(process.device.type)
    start_model_parallel(config.parallel, 60.0)
    seed_all(config.seed)
    core_config = transformer_config(config)
    is_half = config.precision.mode == "bf16"
    chunks = [
        DistributedDataParallel(
            config=core_config,
            ddp_config=DistributedDataParallelConfig(use_distributed_optimizer=True),
            module=Float16Module(core_config, chunk) if is_half else chunk,
        )
        for chunk in build(config)
    ]
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=1e-3,
        bf16=is_half,
        params_dtype=core_config.params_dtype,
        use_distributed_optimizer=True,
    )
    optimizer = get_megatron_optimizer(optimizer_config, chunks)
    layout = RankLayout.of(config.parallel, world_size)
    state = RunState.of(config, layout, step=STEP, consumed_samples=4 * STEP)
    checkpoints = Path(config.run.output_dir) / "checkpoints"
    return str(save_checkpoint(checkpoints, chunks, optimizer, state, dump_config(config)))


def write_tokenizer(folder: Path) -> Path:
    """A byte-level BPE of 300 tokens with an end-of-text token, as a bare tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat and the dog and the hat of the cat"] * 9, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"
